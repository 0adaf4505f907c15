"""Random visual tokens: the floor that shows what a budget is worth without any choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llm_accel.methods.base import MethodInfo, option
from llm_accel.methods.selection import top_tokens, uniform
from llm_accel.methods.visual.base import VisualTokens


@dataclass(frozen=True)
class RandomTokens(VisualTokens):
    """Keeps a seeded random choice of each image's visual tokens, the same for images of the same size."""

    seed: int = option("seed of the draw; the same seed keeps the same tokens", 0)

    name: ClassVar[str] = "random_tokens"
    info: ClassVar[MethodInfo] = MethodInfo(
        "control, no paper", "visual tokens before the language model", kinds=("vision",)
    )

    def choose(self, count: int, scores: Tensor | None, device: torch.device) -> Tensor:
        position = torch.arange(count, device=device)
        stream = torch.tensor(self.seed, device=device)
        return top_tokens(uniform(position, stream), self.tokens(count))
