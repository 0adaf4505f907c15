"""Down-sampling: the image is made smaller before the vision tower sees it. The baseline that a choice among the tokens
of the full image must beat; no paper.

The largest grid of tokens with the shape of the image and no more than the budget decides the new size; the image is
resampled to it as image processors do (bicubic, antialiased). The tower runs on the smaller image: towers for one size
interpolate their position embeddings, towers for any size need nothing. So the tower gets cheaper as well, and each
token covers a larger part of the image, while a token that is chosen from the full image covers as much as before. The
tokens take the places of evenly spaced ones of the full image, so that positions in the language model stay spread over
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from llm_accel.methods.base import MethodInfo
from llm_accel.methods.visual.base import VisualInput


@dataclass(frozen=True)
class Downsample(VisualInput):
    """Makes the image smaller until it has no more tokens than the budget. Its tokens take the places of evenly spaced
    ones of the full image, row by row, so that they keep positions of the full image."""

    name: ClassVar[str] = "downsample"
    info: ClassVar[MethodInfo] = MethodInfo(
        "control, no paper", "visual tokens, before the vision tower", kinds=("vision",)
    )

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of tokens of the smaller image, for one of ``rows`` x ``columns`` tokens."""
        kept = self.tokens(rows * columns)
        width = min(max(1, isqrt(kept * columns // rows)), kept)
        height = min(max(1, isqrt(kept * rows // columns)), kept // width)
        return height, min(width, kept // height)

    def resize(self, images: Tensor, height: int, width: int) -> Tensor:
        """Images [B, c, H, W] in a smaller size in pixels: [B, c, height, width], same dtype."""
        smaller = F.interpolate(images.float(), (height, width), mode="bicubic", antialias=True, align_corners=False)
        return smaller.to(images.dtype)
