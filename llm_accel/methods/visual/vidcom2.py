"""VidCom2: frames that are unlike the rest of their video keep more tokens (arXiv 2505.14454).

With x_ti the n tokens of each of T frames, as they enter the language model, g the mean of all of them, g_t that of
frame t, and R the share that stays:

    frames   u_t = -mean_i cos(x_ti, g),   s_t = exp((u_t - max u) / tau) / (sum_l exp((u_l - max u) / tau) + 1e-8)
             r_t = R (1 + s_t - 1 / T),    r_t n tokens of frame t stay
    tokens   u_ti = -cos(x_ti, g) - cos(x_ti, g_t),   those with the largest stay

These are equations 3 to 10 of the paper, with its tau. It rounds r_t n up in every frame, so that up to T tokens more
stay; here they are rounded so that R T n of the video stay, and no frame keeps more than it has. Its code, which comes
without a licence, was not read. No attention is looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_accel.methods.base import MethodInfo, option
from llm_accel.methods.selection import top_tokens
from llm_accel.methods.visual.base import VideoTokens


@dataclass(frozen=True)
class VidCom2(VideoTokens):
    """Keeps the tokens that are unlike their frame and their video, more of them in frames that are unlike the rest."""

    tau: float = option("temperature between frames: the lower, the more the most unlike frame gets", 0.01, least=1e-6)

    name: ClassVar[str] = "vidcom2"
    info: ClassVar[MethodInfo] = MethodInfo(
        "VidCom2, arXiv 2505.14454", "tokens of videos before the language model, by uniqueness", kinds=("vision",)
    )

    def keep(self, frames: Tensor) -> Tensor:
        frames = frames.double()
        video = F.cosine_similarity(frames, frames.mean((0, 1)), dim=-1)
        own = F.cosine_similarity(frames, frames.mean(1, keepdim=True), dim=-1)
        keep = torch.zeros_like(own, dtype=torch.bool)
        for frame, count in enumerate(self.counts(-video.mean(1), own.shape[1])):
            keep[frame, top_tokens(-(video[frame] + own[frame]), count)] = True
        return keep

    def counts(self, uniqueness: Tensor, count: int) -> list[int]:
        """Tokens that each frame keeps, of ``count`` each; ``uniqueness``: fp64 [T]."""
        frames = len(uniqueness)
        total = self.total(frames, count)
        weights = ((uniqueness - uniqueness.max()) / self.tau).exp()
        share = 1 + weights / (weights.sum() + 1e-8) - 1 / frames
        wanted = (total / frames * share).tolist()
        kept = [min(count, int(number)) for number in wanted]
        # what rounding and full frames leave over goes to the frames that are furthest below what they wanted
        while sum(kept) < total:
            lacking = [
                number - have if have < count else -float("inf") for number, have in zip(wanted, kept, strict=True)
            ]
            kept[lacking.index(max(lacking))] += 1
        return kept
