"""EVS, Efficient Video Sampling: tokens that hardly differ from the frame before leave (arXiv 2510.14624).

The paper compares the pixels of a patch with those of the frame before; engines that run it, vLLM for one, compare the
features, and so does this. With x_ti the token of frame t at place i, as it enters the language model:

    d_ti = 1 - cos(x_ti, x_(t-1)i),   d_0i = infinity

The K tokens of the video with the largest d stay, of equal ones the earlier. The first frame stays as a whole, so K is
at least its number of tokens; a frame that is a copy of the one before loses all. No attention is looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_accel.methods.base import MethodInfo
from llm_accel.methods.selection import top_tokens
from llm_accel.methods.visual.base import VideoTokens

_SLACK = 1e-12  # copies of a token differ by rounding: they are alike


@dataclass(frozen=True)
class EVS(VideoTokens):
    """Keeps the first frame of a video, and what changes from frame to frame."""

    name: ClassVar[str] = "evs"
    info: ClassVar[MethodInfo] = MethodInfo(
        "EVS, arXiv 2510.14624", "tokens of videos before the language model, by change", kinds=("vision",)
    )

    def total(self, frames: int, count: int) -> int:
        return max(count, super().total(frames, count))

    def keep(self, frames: Tensor) -> Tensor:
        direction = F.normalize(frames.double(), dim=-1)
        change = (1 - (direction[1:] * direction[:-1]).sum(-1)).clamp(min=_SLACK)
        change = torch.cat([torch.full_like(direction[:1, :, 0], torch.inf), change])
        keep = torch.zeros_like(change, dtype=torch.bool)
        keep.view(-1)[top_tokens(change.flatten(), self.total(*change.shape))] = True
        return keep
