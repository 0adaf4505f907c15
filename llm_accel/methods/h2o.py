"""H2O: the entries that have received most attention so far stay, and the recent ones (arXiv 2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from llm_accel.errors import ConfigError
from llm_accel.methods.base import MethodInfo, option
from llm_accel.methods.budget import DEFAULT_BUDGET
from llm_accel.methods.roles import PromptView, StepEviction, StepView
from llm_accel.methods.selection import select_top


@dataclass(frozen=True)
class H2O(StepEviction):
    """Heavy hitters and recent entries per KV head, during the whole generation. Each decode step attends to a full
    budget and the new token, adds the attention to the scores, and frees the slot of the lowest old entry."""

    heavy: int | None = option("heavy hitters kept; what the recent entries leave of the budget when not given", None)
    recent: int | None = option("newest entries, always kept; half of the budget when not given", None)
    sinks: int = option("first real tokens, always kept; 0 in the paper", 4)
    norm: Literal["sum", "mean"] = option(
        "rank by attention received: its sum, or its mean per query that could see it", "sum"
    )
    decay: float = option("factor on the scores at each decode step, in (0, 1]; 1 in the paper", 1.0)

    name: ClassVar[str] = "h2o"
    info: ClassVar[MethodInfo] = MethodInfo(
        paper="H2O, arXiv 2306.14048",
        cuts="KV cache after the prompt and while decoding",
        needs_query=False,
        frees_memory=True,
    )

    def validate(self) -> None:
        if self.sinks < 0:
            self.fail("sinks", "an integer of at least 0")
        if self.recent is not None and self.recent < 0:
            self.fail("recent", "an integer of at least 0, or None for half of the budget")
        self._settle_split()
        if not 0.0 < self.decay <= 1.0:
            self.fail("decay", "a number in (0, 1]")
        super().validate()

    def _settle_split(self) -> None:
        """Of budget, heavy and recent, two determine the third."""
        if self.heavy is None and self.recent is None:
            return
        if self.ratio is not None:
            raise ConfigError("h2o: heavy and recent count entries; give budget instead of ratio, or leave them out.")
        if self.heavy is not None and self.heavy < 0:
            self.fail("heavy", "an integer of at least 0, or None")
        if self.heavy is not None and self.recent is not None:
            total = self.heavy + self.recent
            if self.budget not in (None, total):
                raise ConfigError(
                    f"h2o: heavy={self.heavy} and recent={self.recent} make {total}, "
                    f"not budget={self.budget}; give two of the three."
                )
            object.__setattr__(self, "budget", total)
        elif self.heavy is not None:
            object.__setattr__(self, "recent", (self.budget or DEFAULT_BUDGET) - self.heavy)

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
    def vacancies(self) -> int:
        return 1

    @property
    def accumulates(self) -> bool:
        return True

    @property
    def score_decay(self) -> float:
        return self.decay

    def recent_of(self, entries: Tensor) -> Tensor:
        """Recent entries within a budget of ``entries``, int64 of the same shape."""
        return torch.full_like(entries, self.recent) if self.recent is not None else entries // 2

    def select(self, view: PromptView) -> Tensor:
        assert view.scores is not None
        rank, lengths = view.ranks, view.lengths
        counts = self.row_entries(lengths, view)
        forced = (rank < self.sinks) | (rank >= (lengths - self.recent_of(counts))[:, None])
        if view.protected is not None:
            forced = forced | view.protected
        scores = view.scores
        if self.norm == "mean":
            scores = scores / (lengths[:, None] - rank).clamp(min=1)[:, None]
        return select_top(scores, counts, width=self.widest(counts, view), valid=rank >= 0, forced=forced)

    def victims(self, view: StepView) -> Tensor:
        """The entry with the lowest score among those that left the recent window, the oldest of equals."""
        assert view.scores is not None
        newest = view.positions.amax(-1, keepdim=True)
        entries = torch.full_like(newest, view.positions.shape[-1] - 1)
        fixed = (view.positions < self.sinks) | (view.positions > newest - self.recent_of(entries))
        scores = view.scores
        if self.norm == "mean":
            scores = scores / (newest - view.positions + 1)
        scores = scores.masked_fill(fixed, float("inf"))
        lowest = scores.amin(-1, keepdim=True)
        oldest = view.positions.masked_fill(scores > lowest, torch.iinfo(torch.int64).max)
        return oldest.argmin(-1)
