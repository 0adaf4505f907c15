"""How many KV entries a method may keep: an absolute ``budget`` or a ``ratio`` of the prompt, never both."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_accel.methods.base import ENTRIES, MethodConfig, option

DEFAULT_BUDGET = 2048


def fraction(ratio: float, length: int) -> int:
    """``ratio`` of ``length``, rounded up, at least 1."""
    return max(1, math.ceil(ratio * length - 1e-9))


@dataclass(frozen=True)
class Budgeted(MethodConfig):
    """Entries kept per KV head and layer, counted with everything that is always kept (window, sinks, recent)."""

    budget: int | None = option(
        f"KV entries kept per KV head and layer; {DEFAULT_BUDGET} when no ratio is given", None, most=2 * ENTRIES
    )
    ratio: float | None = option(
        "fraction of the prompt (earlier turns included) kept, in (0, 1]; not with budget", None, share="(0, 1]"
    )

    def validate(self) -> None:
        self.at_most_one("budget", "ratio")
        if self.ratio is None and (self.budget if self.budget is not None else DEFAULT_BUDGET) < self.least:
            default = f"; None means {DEFAULT_BUDGET}" if self.budget is None else ""
            self.fail("budget", f"an integer above {self.least - 1} ({self.reserved_for}{default})")

    @property
    def reserved(self) -> int:
        """Entries that are kept whatever the scores say."""
        return 0

    @property
    def least(self) -> int:
        """The smallest budget that makes sense: what is always kept and one entry by choice."""
        return self.reserved + 1

    @property
    def reserved_for(self) -> str:
        """What the reserved entries are, for messages."""
        return "at least one entry is kept"

    def entries(self, length: int) -> int:
        """Entries that a row of ``length`` real tokens keeps per KV head."""
        if self.ratio is None:
            return min(length, self.budget or DEFAULT_BUDGET)
        return min(length, max(fraction(self.ratio, length), self.reserved))

    def entries_per_row(self, lengths: Tensor) -> Tensor:
        """:meth:`entries` for a tensor of row lengths, int64 [B], without a device synchronisation."""
        if self.ratio is None:
            return lengths.clamp(max=self.budget or DEFAULT_BUDGET)
        kept = torch.ceil(self.ratio * lengths.double() - 1e-9).long()
        return torch.minimum(lengths, kept.clamp(min=max(self.reserved, 1)))
