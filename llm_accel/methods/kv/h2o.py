"""H2O: the entries that have received most attention so far stay, and the recent ones (arXiv 2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from llm_accel.errors import ConfigError
from llm_accel.kernels import column_votes, slot_decode
from llm_accel.kernels.dispatch import Problem
from llm_accel.methods.attention import AttentionView
from llm_accel.methods.base import ENTRIES, MethodInfo, option
from llm_accel.methods.budget import DEFAULT_BUDGET
from llm_accel.methods.prompt_view import PromptView
from llm_accel.methods.roles import StepEviction, StepView
from llm_accel.methods.selection import select_top


@dataclass(frozen=True)
class H2O(StepEviction):
    """Heavy hitters and recent entries per KV head, during the whole generation. Each decode step attends to a full
    budget and the new token, adds the attention to the scores, and frees the slot of the lowest old entry."""

    heavy: int | None = option(
        "number of heavy hitters; by default the rest of the budget after the recent entries",
        None,
        most=ENTRIES,
        least=0,
    )
    recent: int | None = option(
        "newest entries, always kept; by default half of the budget, or what the sinks leave",
        None,
        most=ENTRIES,
        least=0,
    )
    sinks: int = option("first real tokens, always kept; 0 in the paper", 4, most=ENTRIES, least=0)
    norm: Literal["sum", "mean"] = option(
        "score by attention received: the sum, or the mean per query that could see the entry", "sum"
    )
    decay: float = option("decay of the scores per decode step, in (0, 1]; 1 in the paper", 1.0, share="(0, 1]")
    semantics: Literal["real_drop", "sim"] = option(
        "real_drop: entries are evicted; sim: the masking simulation of the authors, which frees no memory", "real_drop"
    )

    name: ClassVar[str] = "h2o"
    info: ClassVar[MethodInfo] = MethodInfo("H2O, arXiv 2306.14048", "KV cache after the prompt and while decoding")

    def validate(self) -> None:
        self._settle_split()
        if self.hides and self.recent == 0:
            self.fail("recent", "an integer of at least 1 with semantics=sim, which counts the new token as recent")
        super().validate()

    def _settle_split(self) -> None:
        """Of budget, heavy and recent, two determine the third."""
        if self.heavy is None and self.recent is None:
            return
        if self.ratio is not None:
            raise ConfigError("h2o: heavy and recent count entries; give budget instead of ratio, or leave them out.")
        if self.heavy is not None and self.recent is not None:
            total = self.heavy + self.recent
            if self.budget not in (None, total):
                raise ConfigError(
                    f"h2o: heavy={self.heavy} and recent={self.recent} make {total}, "
                    f"not budget={self.budget}; give two of the three."
                )
            object.__setattr__(self, "budget", total)
        elif self.heavy is not None:
            budget = DEFAULT_BUDGET if self.budget is None else self.budget
            if self.heavy > budget:
                self.fail("heavy", f"at most budget={budget}")
            object.__setattr__(self, "budget", budget)  # all three stand in the text form then
            object.__setattr__(self, "recent", budget - self.heavy)

    @property
    def reserved(self) -> int:
        return self.sinks + (self.recent or 0)

    @property
    def least(self) -> int:
        return max(1, self.reserved)  # without heavy hitters it is a plain recency window

    @property
    def reserved_for(self) -> str:
        return f"{self.sinks} sinks and {self.recent or 0} recent entries are always kept and count"

    @property
    def hides(self) -> bool:
        return self.semantics == "sim"

    @property
    def empty_slots(self) -> int:
        return 0 if self.hides else 1

    @property
    def accumulates(self) -> bool:
        return True

    @property
    def score_decay(self) -> float:
        return self.decay

    def recent_of(self, entries: Tensor) -> Tensor:
        """Recent entries within a budget of ``entries``, int64 of the same shape: half of it, or what sinks leave."""
        if self.recent is not None:
            return torch.full_like(entries, self.recent)
        return torch.minimum(entries // 2, (entries - self.sinks).clamp(min=0))

    def score(self, view: PromptView) -> Tensor:
        """Attention received, or its mean per query that could see the entry."""
        assert view.scores is not None
        if self.norm == "sum":
            return view.scores
        return view.scores / (view.lengths[:, None] - view.cache_positions).clamp(min=1)[:, None]

    def always_keep(self, view: PromptView) -> Tensor:
        position, lengths = view.cache_positions, view.lengths
        counts = self.row_entries(lengths, view)
        return (position < self.sinks) | (position >= (lengths - self.recent_of(counts))[:, None])

    def select(self, view: PromptView) -> Tensor:
        return self._shown(view) if self.hides else super().select(view)

    def _shown(self, view: PromptView) -> Tensor:
        """What the next token attends to besides itself in the simulation: it counts as a recent entry, and the one
        that it displaces from the recent window is not a candidate in this step."""
        position, lengths = view.cache_positions, view.lengths + 1
        counts = self.entries_per_row(lengths) if view.entries is None else torch.minimum(lengths, view.entries)
        oldest_recent = (lengths - self.recent_of(counts))[:, None]
        leaving = (position == oldest_recent - 1) & (counts < lengths)[:, None]
        forced = (position < self.sinks) | (position >= oldest_recent)
        if view.protected is not None:
            forced = forced | view.protected
        width = int(counts.max()) - 1
        return select_top(self.score(view), counts - 1, width=width, valid=(position >= 0) & ~leaving, forced=forced)

    def backends(self, problem: Problem) -> dict[str, tuple[str, str]]:
        scores = {"scores": column_votes.OP.explain(problem)}
        return scores if self.hides else scores | {"decode": slot_decode.OP.explain(problem)}

    def attend_and_choose(self, view: AttentionView, slots: StepView) -> tuple[Tensor, Tensor, Tensor] | None:
        """In one operation where there are kernels for it; plain torch computes no attention that the model can."""
        problem = Problem.of(view.query, view.key, view.value)
        if slots.scores is None or slot_decode.OP.choose(problem).name == "torch":
            return None
        return slot_decode.slot_decode(
            view.query,
            view.key,
            view.value,
            slots.scores,
            slots.positions,
            view.start,
            scaling=view.scaling,
            softcap=view.softcap,
            sinks=view.sinks,
            decay=self.decay,
            keep_first=self.sinks,
            keep_recent=self._recent_slots(slots),
            per_query=self.norm == "mean",
        )

    def victims(self, view: StepView) -> Tensor:
        """The entry with the lowest score among those that left the recent window, the oldest of equals."""
        assert view.scores is not None
        recent = self._recent_slots(view)
        return slot_decode.lowest_slots(view.scores, view.positions, self.sinks, recent, self.norm == "mean")

    def _recent_slots(self, view: StepView) -> int:
        """Recent entries of a full cache, which has a slot beyond the budget."""
        if self.recent is not None:
            return self.recent
        budget: int = view.positions.shape[-1] - 1
        return min(budget // 2, max(0, budget - self.sinks))
