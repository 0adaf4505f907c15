"""Evenly spaced visual tokens: what a budget is worth when nothing but the position is looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llm_accel.methods.base import MethodInfo
from llm_accel.methods.selection import evenly_spaced
from llm_accel.methods.visual.base import VisualTokens


@dataclass(frozen=True)
class StrideTokens(VisualTokens):
    """Keeps the middle token of each of ``budget`` equal stretches of an image in raster order."""

    name: ClassVar[str] = "stride_tokens"
    info: ClassVar[MethodInfo] = MethodInfo(
        "control, no paper", "visual tokens before the language model", kinds=("vision",)
    )

    def choose(self, count: int, scores: Tensor | None, device: torch.device) -> Tensor:
        return evenly_spaced(count, self.tokens(count), device)
