"""Stacked pruning: coarse chunks of the whole context first, finer ones of what is left, blocks at the end.

InfiniteHiP (arXiv 2502.08910): each stage scores its chunks by a few of their keys and hands the best on to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from llm_accel.kernels.hip_select.candidates import Keys, representatives, zero
from llm_accel.kernels.hip_select.op import OP, steps
from llm_accel.kernels.hip_select.search import Search


@dataclass(frozen=True)
class Stage:
    """One pruning stage.

    Args:
        chunk: keys of a chunk, a power of two.
        tokens: keys that enter the stage; None for all of them.
        stride: queries that one representative query stands for.
    """

    chunk: int
    tokens: int | None
    stride: int


@dataclass(frozen=True)
class StageSearch(Search):
    """The settings of a search; see :class:`llm_accel.kernels.hip_select.search.Search`.

    Args:
        stages: coarse to fine; chunks of the last are the chosen blocks.
        last_exact: whether the last stage reads every key of its chunks rather than bisecting them.
    """

    stages: Sequence[Stage]
    last_exact: bool = True

    def kept(self, stage: int) -> int:
        """Chunks that stage ``stage`` hands on."""
        last = stage + 1 == len(self.stages)
        tokens = self.budget if last else self.stages[stage + 1].tokens
        assert tokens is not None  # only the first stage is entered by everything
        return tokens // self.stages[stage].chunk

    def run_stages(
        self, query: Tensor, keys: Keys, first: Tensor, blocks: range, starts: Tensor, end: Tensor, stage: int = 0
    ) -> list[Tensor]:
        """Runs the stages from ``stage`` on; the chunks that each of them kept, ascending, absent ones last.

        Args:
            query: [B, Hq, T, D].
            first: first real query of each row, int64 [B or 1].
            blocks: the query blocks n that are searched.
            starts: chunks that enter, int64 [B, H, n, m], :data:`ABSENT` where there is none.
            end: position at which the candidates of each query block end, int64 [B or 1, 1, n, 1].
        """
        found, reps, stride, level, does = [], query, 0, None, steps(keys.problem)
        for index in range(stage, len(self.stages)):
            chunk = self.stages[index].chunk
            if index > stage:
                starts = does.enter(starts, None, end, self.stages[index - 1].chunk, chunk, 0, 0)
            kept = self.kept(index)
            if starts.shape[-1] > kept:
                if self.stages[index].stride != stride:
                    stride = self.stages[index].stride
                    heads = keys.origin.shape[1]
                    reps = representatives(query, heads, first, blocks, self.scope.block_q, stride)
                    level = self.level(reps, keys, end)
                exact = self.last_exact and index + 1 == len(self.stages)
                score = does.score(reps, keys, starts, end, chunk, exact, level)
                starts = does.keep(self.shared(score), starts, kept)
            found.append(starts)
        return found

    def elements(self, keys: Keys, slots: int, width: int) -> int:
        """The keys of all chunks of a stage; where a kernel reads them, the chunks themselves."""
        reads = [min(slots, stage.tokens or slots) // stage.chunk for stage in self.stages]
        most = max(*reads, reads[-1] * self.stages[-1].chunk if self.last_exact else 1)
        return most * (keys.rows.shape[-1] if OP.choose(keys.problem).name == "torch" else 1)

    def choose(
        self, query: Tensor, keys: Keys, first: Tensor, blocks: range, end: Tensor, most: int, width: int
    ) -> Tensor:
        """What the last stage keeps."""
        chunks = self._everything(keys, end, most)
        return self.run_stages(query, keys, first, blocks, chunks, end)[-1][..., :width]

    def _everything(self, keys: Keys, end: Tensor, most: int) -> Tensor:
        """What enters the first stage, int64 [B, H, n, m]."""
        chunk, scope = self.stages[0].chunk, self.scope
        starts: Tensor = steps(keys.problem).enter(None, None, end, chunk, chunk, scope.sink, -(-most // chunk))
        return starts.expand(*keys.origin.shape[:2], -1, -1)

    def refine(
        self,
        query: Tensor,
        keys: Keys,
        end: Tensor,
        most: int,
        stage: int,
        kept: Sequence[Tensor],
        before: Tensor | None,
        moved: int,
    ) -> list[Tensor]:
        """Stages from ``stage`` on for one query, which has moved on since the earlier stages chose.

        Args:
            query: [B, Hq, 1, D].
            end: position at which the candidates end, int64 [B or 1, 1, 1, 1].
            most: candidate keys of the longest row, or more.
            kept: chunks that each earlier stage kept, int64 [B, H, 1, n].
            before: where the candidates of the stage before ended when it chose, as ``end``; chunks that have left the
                window since then enter too. None for the first stage.
            moved: tokens since then, or more.

        Returns:
            The chunks that ``stage`` and each later one kept, ascending, absent ones last.
        """
        if before is None:
            starts = self._everything(keys, end, most)
        else:
            chunk, scope = self.stages[stage].chunk, self.scope
            fresh = -(-(moved + scope.block_k + chunk) // chunk)
            enter, cut = steps(keys.problem).enter, self.stages[stage - 1].chunk
            starts = enter(kept[stage - 1], before, end, cut, chunk, scope.sink, fresh)
            if starts.shape[-1] <= self.kept(stage):  # nothing puts them in order on the way
                starts = starts.sort(dim=-1).values
        return self.run_stages(query, keys, zero(query.device), range(1), starts, end, stage)
