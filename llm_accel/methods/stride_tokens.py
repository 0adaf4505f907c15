"""Evenly spaced visual tokens: what a target is worth when nothing but the position is looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llm_accel.methods.base import MethodInfo
from llm_accel.methods.visual import VisualTokens


@dataclass(frozen=True)
class StrideTokens(VisualTokens):
    """Keeps the middle token of each of ``target`` equal stretches of an image in raster order."""

    name: ClassVar[str] = "stride_tokens"
    info: ClassVar[MethodInfo] = MethodInfo(
        paper="control, no paper",
        cuts="visual tokens before the language model",
        needs_query=False,
        frees_memory=True,
        kinds=("vision",),
    )

    def choose(self, count: int, scores: Tensor | None, device: torch.device) -> Tensor:
        kept = self.tokens(count)
        return (2 * torch.arange(kept, device=device) + 1) * count // (2 * kept)
