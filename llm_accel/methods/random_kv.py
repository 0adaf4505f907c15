"""Random KV entries: the floor that shows what a budget is worth without any choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llm_accel.methods.base import ENTRIES, MethodInfo, option
from llm_accel.methods.roles import PromptCompression, PromptView
from llm_accel.methods.selection import select_top, uniform


@dataclass(frozen=True)
class RandomKV(PromptCompression):
    """Keeps the last entries and a seeded random choice of the others, drawn per layer and KV head."""

    window: int = option("last entries of the prompt, always kept", 32, most=ENTRIES)
    seed: int = option("seed of the draw; the same seed keeps the same positions", 0)

    name: ClassVar[str] = "random"
    info: ClassVar[MethodInfo] = MethodInfo(
        paper="control, no paper", cuts="KV cache after the prompt", needs_query=False, frees_memory=True
    )

    def validate(self) -> None:
        if self.window < 0:
            self.fail("window", "an integer of at least 0")
        super().validate()

    @property
    def reserved(self) -> int:
        return self.window

    @property
    def reserved_for(self) -> str:
        return f"the last {self.window} entries are always kept and count"

    def select(self, view: PromptView) -> Tensor:
        rank, counts = view.ranks, self.row_entries(view.lengths, view)
        forced = torch.arange(view.slots, device=rank.device)[None] >= view.slots - self.window
        if view.protected is not None:
            forced = forced | view.protected
        head = view.heads.numbers(view.kv_heads, rank.device)[None, :, None]
        stream = (self.seed * 4099 + view.layer) * 1031 % 2**32  # all that the hash reads of it; more may pass int64
        draw = uniform(rank[:, None], stream + head)
        return select_top(
            draw.expand(len(counts), -1, -1),
            counts=counts,
            width=self.widest(counts, view),
            valid=rank >= 0,
            forced=forced,
        )
