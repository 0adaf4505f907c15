"""VHR: heads whose output changes most when the image is taken out of the prompt are scaled up (arXiv 2412.13949).

With A_h the output of head h for the last token of the prompt, before the output projection, and A'_h the same where
the tokens of the image are removed:

    VHD_h = || A_h - A'_h ||,   TA_h = || A'_h ||^2
    VHD_h = 0  where VHD_h and TA_h both exceed their mean over the heads of the layer by a standard deviation
    A_h <- alpha A_h  for all tokens from here on, where VHD_h > median of VHD

layer by layer, so that what a layer compares has gone through the scaled ones before it. The second layer takes part
and the last 14 of 32. Whether the standard deviation is that of a sample the paper does not say; here it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llm_accel.methods.base import LAYERS, MethodInfo, option
from llm_accel.methods.visual.grounding import HeadScaling

LAST = 14 / 32  # share of the layers, from the end
CLIFF = 3.0


@dataclass(frozen=True)
class VHR(HeadScaling):
    """Scales up the heads that respond to the image; ``alpha=1`` switches it off."""

    alpha: float = option("factor on the outputs of the chosen heads; 1: off", 2.0, most=100.0, least=0)
    layers: tuple[int, ...] | None = option(
        "layers whose heads are chosen from, for example 1+18+19; None: the second one and the last 14 of every 32",
        None,
        most=LAYERS,
    )
    discard: bool = option("leave out heads that surge when the image is taken away", True)
    both: bool = option("scale the pass without the image too, so that later layers compare like with like", True)

    name: ClassVar[str] = "vhr"
    info: ClassVar[MethodInfo] = MethodInfo(
        "Vision-aware Head Reinforcement, arXiv 2412.13949",
        "nothing; against hallucination",
        needs_query=True,
        frees_memory=False,
        kinds=("vision",),
    )

    def validate(self) -> None:
        if self.layers is not None and (not self.layers or any(index < 0 for index in self.layers)):
            self.fail("layers", "layer indices counted from 0, or None")

    @property
    def acts(self) -> bool:
        return self.alpha != 1

    @property
    def scales_both(self) -> bool:
        return self.both

    @property
    def cautions(self) -> tuple[str, ...]:
        if self.alpha <= CLIFF:
            return ()
        return (f"vhr: alpha={self.alpha:g} is beyond 3; at 4 the paper's model stopped describing its images",)

    def acting_layers(self, layers: int) -> tuple[int, ...]:
        if self.layers is not None:
            return self._check_layers(self.layers, layers)
        return tuple(sorted({min(1, layers - 1), *range(layers - round(LAST * layers), layers)}))

    def factors(self, seen: Tensor, blind: Tensor) -> Tensor:
        precise = torch.promote_types(seen.dtype, torch.float32)
        seen, blind = seen.to(precise), blind.to(precise)
        change = (seen - blind).norm(dim=-1)
        if self.discard:
            surging = _outstanding(change) & _outstanding(blind.square().sum(-1))
            change = change.masked_fill(surging, 0.0)
        # of an even number of heads the lower median; none lies between the two, so the same heads are above both
        chosen = change > change.median(-1, keepdim=True).values
        return torch.ones_like(change, dtype=torch.float32).masked_fill(chosen, self.alpha)


def _outstanding(values: Tensor) -> Tensor:
    """bool [B, H]: which heads are above the mean of their layer by more than a standard deviation."""
    return values > values.mean(-1, keepdim=True) + values.std(-1, keepdim=True)
