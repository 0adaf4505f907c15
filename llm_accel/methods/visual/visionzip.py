"""VisionZip: the tokens that the class token looks at stay, the others are merged by the likeness of their keys
(arXiv 2412.04467).

In the layer of the tower whose features are used:

- dominant tokens are those that the class token pays most attention, mean over heads; in a tower without a class token
  those that receive most attention from all patches;
- contextual tokens are spaced among the rest, in raster order. Every other token joins that one of them whose key,
  averaged over heads, has the largest cosine with its own, and its features enter into those of that one.

The paper has 54 dominant and 10 contextual tokens of 64, and the same shares of 128 and 192. As released
(``variant="paper"``), one of the dominant tokens is the class token itself, which enters the language model; contextual
tokens are every n-th of the rest, from its first on; one takes in the average of the tokens that join it on top of its
own features; and the language model gets class token, dominant and contextual tokens in this order, counted without
gaps. The release is for LLaVA's towers. Where there is no class token, or none that can become a visual token, a patch
takes its place, and tokens stay where they were.

``variant="spread"``: no class token; contextual tokens are the middles of equal stretches of the rest; the features of
a group are averaged, which keeps their length; tokens stay where they were.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_accel.methods.base import ENTRIES, MethodInfo, option
from llm_accel.methods.selection import evenly_spaced, top_tokens
from llm_accel.methods.visual.tower import TowerMerge, TowerView, received, relation


@dataclass(frozen=True)
class VisionZip(TowerMerge):
    """Keeps the visual tokens that the class token looks at, and merges the others into a few."""

    positions: Literal["original", "compact", "auto"] = option(  # type: ignore[assignment]
        "original: tokens keep their positions in the prompt; compact: they are renumbered without gaps, for models "
        "whose positions have one axis; auto: as released, compact there with variant=paper, else original",
        "auto",
    )
    variant: Literal["paper", "spread"] = option(
        "paper: as released, with the class token as one of the dominant tokens; spread: without it, contextual tokens "
        "in the middle of equal stretches, groups averaged",
        "paper",
    )
    dominant: int = option(
        "tokens kept by attention received; a proportion where budget or ratio is given",
        54,
        most=ENTRIES,
        least=1,
    )
    contextual: int = option(
        "tokens that the others are merged into; a proportion where budget or ratio is given",
        10,
        most=ENTRIES,
        least=0,
    )

    name: ClassVar[str] = "visionzip"
    info: ClassVar[MethodInfo] = MethodInfo(
        "VisionZip, arXiv 2412.04467", "visual tokens, after the vision tower", kinds=("vision",)
    )

    @property
    def default_budget(self) -> int | None:
        return self.dominant + self.contextual

    @property
    def last_layer_only(self) -> bool:
        return True

    @property
    def takes_class(self) -> bool:
        return self.variant == "paper"

    def compact_on(self, axes: int) -> bool:
        return self.positions == "compact" or (self.positions == "auto" and self.variant == "paper" and axes == 1)

    def score(self, view: TowerView, before: Tensor | None) -> Tensor:
        return relation(view)[:, 1:] if view.class_token else received(view)

    def metric(self, view: TowerView) -> Tensor:
        return view.key[:, :, int(view.class_token) :].float().mean(1)

    def split(self, scores: Tensor, kept: int, others: int = 0) -> tuple[Tensor, Tensor]:
        contextual = kept * self.contextual // (self.dominant + self.contextual)
        dominant = top_tokens(scores, kept - contextual - others)
        rest = scores.new_ones(scores.shape).index_fill(0, dominant, 0).nonzero()[:, 0]
        if self.variant == "paper":
            step = len(rest) // max(1, contextual)
            return dominant, rest[torch.arange(contextual, device=rest.device) * step]
        return dominant, rest[evenly_spaced(len(rest), contextual, rest.device)]

    def merge(self, features: Tensor, parts: tuple[Tensor, Tensor], metric: Tensor) -> Tensor:
        dominant, centres = parts
        if len(centres) == 0:
            return features
        direction = F.normalize(metric, dim=-1)
        nearest = (direction @ direction[centres].mT).argmax(-1)
        wide = features.to(torch.promote_types(features.dtype, torch.float32))
        member = F.one_hot(nearest, len(centres)).to(wide)
        own = F.one_hot(nearest.new_tensor(range(len(centres))), len(centres)).to(wide)
        member[centres] = own if self.variant == "spread" else 0.0
        member[dominant] = 0
        merged = (member.mT @ wide) / member.sum(0)[:, None].clamp(min=1)
        merged = merged if self.variant == "spread" else merged + wide[centres]
        return features.index_copy(0, centres, merged.to(features.dtype))
