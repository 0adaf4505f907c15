"""DivPrune: the visual tokens that are least alike stay (arXiv 2503.02175).

With d(i, j) = 1 - cos(v_i, v_j) between the tokens v as they enter the language model, the kept set S grows greedily
towards the largest least distance:

    S = {argmax_i min_{j != i} d(i, j)},  then  S <- S + argmax_{i not in S} min_{j in S} d(i, j)

until it has as many as the budget. No attention is looked at, neither in the tower nor in the language model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_accel.methods.base import MethodInfo
from llm_accel.methods.visual.base import EntranceTokens

_SLACK = 1e-9  # copies of a token differ by rounding: the first one counts


@dataclass(frozen=True)
class DivPrune(EntranceTokens):
    """Keeps the visual tokens of a prompt that are least alike."""

    name: ClassVar[str] = "divprune"
    info: ClassVar[MethodInfo] = MethodInfo(
        "DivPrune, arXiv 2503.02175", "visual tokens before the language model, by diversity", kinds=("vision",)
    )

    def pick(self, features: Tensor, text: Tensor, kept: int) -> Tensor:
        direction = F.normalize(features.double(), dim=-1)
        apart = 1 - direction @ direction.mT
        nearest = apart + torch.diag(apart.new_full((len(apart),), torch.inf))
        least = nearest.min(-1).values  # of each token the distance to the nearest other one
        chosen: list[Tensor] = []
        for step in range(kept):
            best = (least >= least.max() - _SLACK).long().argmax()
            chosen.append(best)
            least = apart[best] if step == 0 else torch.minimum(least, apart[best])
            least = least.index_fill(0, torch.stack(chosen), -torch.inf)
        return torch.stack(chosen).sort().values
