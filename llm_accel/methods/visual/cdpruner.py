"""CDPruner: visual tokens that are diverse and belong to the question stay (arXiv 2506.10967).

    relevance   r_i = mean over text tokens t of cos(v_i, t), scaled to [0, 1] over the visual tokens
    kernel      L_ij = r_i cos(v_i, v_j) r_j
    kept        the set of the budget's size with the largest det L_S, found greedily: each step adds the token with
                the largest gain in log det, by Cholesky updates

The paper takes relevance from CLIP's text tower where a model sees with CLIP, and from the language model's own
embeddings otherwise. Here it is always the latter: no text tower is part of the model. No attention is looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_accel.methods.base import MethodInfo
from llm_accel.methods.visual.base import EntranceTokens

_LEAST = 1e-6  # of a relevance: one of 0 would make the kernel singular


@dataclass(frozen=True)
class CDPruner(EntranceTokens):
    """Keeps visual tokens that are diverse, and more of those that the text of the prompt is about."""

    name: ClassVar[str] = "cdpruner"
    info: ClassVar[MethodInfo] = MethodInfo(
        "CDPruner, arXiv 2506.10967",
        "visual tokens before the language model, by diversity and question",
        needs_query=True,
        kinds=("vision",),
    )

    def pick(self, features: Tensor, text: Tensor, kept: int) -> Tensor:
        direction = F.normalize(features.double(), dim=-1)  # differences of nearly equal numbers follow
        relevance = torch.ones_like(direction[:, 0])
        if len(text):
            mean = (direction @ F.normalize(text.double(), dim=-1).mT).mean(-1)
            relevance = (mean - mean.min()) / (mean.max() - mean.min()).clamp(min=_LEAST)
        relevance = relevance.clamp(min=_LEAST)
        kernel = relevance[:, None] * (direction @ direction.mT) * relevance
        gain = kernel.diagonal().clone()
        slack = 1e-9 * gain.max()  # copies of a token differ by rounding: the first one counts
        factors, chosen = kernel.new_zeros(kept, len(kernel)), []
        for step in range(kept):
            best = (gain >= gain.max() - slack).long().argmax()
            chosen.append(best)
            known = factors[:step, best] @ factors[:step]
            factors[step] = (kernel[best] - known) / gain[best].clamp(min=slack).sqrt()
            gain = (gain - factors[step].square()).index_fill(0, torch.stack(chosen), -torch.inf)
        return torch.stack(chosen).sort().values
