"""What the searches share: their settings, and the walk over the query blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llm_accel.kernels.hip_select.candidates import ABSENT, Keys, Scope, first_real, tiles, zero
from llm_accel.kernels.hip_select.op import steps


@dataclass(frozen=True)
class Search(ABC):
    """The settings of a search.

    Args:
        scope: which keys may be chosen.
        budget: keys that are chosen at most, a multiple of ``scope.block_k``.
        share_heads: "group" for a choice of each KV head, "all" for one choice of all heads.
        across: with "all", the maximum over the processes that hold the heads of a layer between them.
        fair: whether each query is compared by what stands out of its own attention; otherwise by its products, and
            those with large ones choose for all.
        scaling: softmax scale; None for that of the head size.
    """

    scope: Scope
    budget: int
    share_heads: str = field(default="group", kw_only=True)
    across: Callable[[Tensor], Tensor] = field(default=lambda score: score, kw_only=True)
    fair: bool = field(default=True, kw_only=True)
    scaling: float | None = field(default=None, kw_only=True)

    def select(self, query: Tensor, key: Tensor, start: Tensor | None) -> Tensor:
        """The chosen blocks of all query blocks, int64 [B, H, n, M], ascending, absent ones last."""
        (batch, _, queries, _), (heads, slots) = query.shape, key.shape[1:3]
        scope, keys = self.scope, Keys.of(key, start)
        first = first_real(queries, slots, start, query.device)
        end = scope.window_start(queries, slots, start, query.device)[:, None, :, None]
        count = scope.blocks(queries)
        width = min(self.budget, scope.most(queries, slots, count - 1)) // scope.block_k
        chosen = torch.full((batch, heads, count, width), ABSENT, device=query.device)
        for blocks in tiles(count, batch * heads * self.elements(keys, slots, width)):
            most = scope.most(queries, slots, blocks[-1])
            if most == 0:
                continue
            here = slice(blocks.start, blocks.stop)
            found = self.choose(query, keys, first, blocks, end[:, :, here], most, width)
            chosen[:, :, here, : found.shape[-1]] = found
        return chosen

    def select_one(self, query: Tensor, keys: Keys, end: Tensor, most: int) -> Tensor:
        """The chosen blocks of one query per row, int64 [B, H, 1, M], ascending, absent ones last.

        Args:
            query: [B, Hq, 1, D].
            end: position at which the candidates end, int64 [B or 1, 1, 1, 1].
            most: candidate keys of the longest row, or more.
        """
        width = min(self.budget, most) // self.scope.block_k
        return self.choose(query, keys, zero(query.device), range(1), end, most, width)

    def level(self, representative: Tensor, keys: Keys, end: Tensor) -> Tensor | None:
        """What is taken off the products of each query before they are compared, fp32 [B, H, n, R]; None where that
        changes nothing, or is not wanted."""
        queries, dim = representative.shape[-2:]
        if not self.fair or (queries == 1 and self.share_heads == "group"):
            return None
        scaling = dim**-0.5 if self.scaling is None else self.scaling
        return steps(keys.problem).level(representative, keys, end, scaling)  # type: ignore[no-any-return]

    def shared(self, score: Tensor) -> Tensor:
        """Scores [B, H, n, m]; of the best head in all of them where all heads share one choice."""
        return score if self.share_heads == "group" else self.across(score.amax(1, keepdim=True)).expand_as(score)

    @abstractmethod
    def elements(self, keys: Keys, slots: int, width: int) -> int:
        """Elements that are gathered at once for a query block and KV head, so that tiles of them fit in memory."""

    @abstractmethod
    def choose(
        self, query: Tensor, keys: Keys, first: Tensor, blocks: range, end: Tensor, most: int, width: int
    ) -> Tensor:
        """The chosen blocks of some query blocks, int64 [B, H, n, up to width], ascending, absent ones last.

        Args:
            query: [B, Hq, T, D].
            first: first real query of each row, int64 [B or 1].
            blocks: the query blocks n that are searched.
            end: position at which the candidates of each query block end, int64 [B or 1, 1, n, 1].
            most: candidate keys of the last of the blocks in the longest row.
            width: blocks that are chosen at most.
        """
