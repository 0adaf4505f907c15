"""DART: visual tokens that duplicate a few others leave after an early layer (arXiv 2502.11494).

Pivots are the visual and the text tokens whose keys have the largest norm in layer K - 1, mean over heads. At the
entrance of layer K each pivot in turn keeps the visual tokens whose hidden states have the lowest cosine with its own,
equally many each; visual pivots stay. No attention is looked at. Decided once, in the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_accel.errors import ConfigError
from llm_accel.methods.base import ENTRIES, LAYERS, MethodInfo, option
from llm_accel.methods.selection import top_tokens
from llm_accel.methods.visual.base import Cut, CutModel, CutView, LastQuery, LayerCut, VisualBudget


@dataclass(frozen=True)
class DART(VisualBudget, LayerCut):
    """Keeps, from layer ``layer`` on, the visual tokens that are least like a few pivots."""

    layer: int = option("the first layer that sees fewer tokens", 2, most=LAYERS, least=1)
    visual_pivots: int = option("visual tokens that others are compared with, and that stay", 4, most=ENTRIES, least=1)
    text_pivots: int = option("text tokens that others are compared with", 4, most=ENTRIES, least=0)

    name: ClassVar[str] = "dart"
    info: ClassVar[MethodInfo] = MethodInfo(
        "DART, arXiv 2502.11494", "visual tokens after an early layer, by duplication", kinds=("vision",)
    )

    def after(self, layers: int) -> int:
        if self.layer >= layers:
            raise ConfigError(f"dart: layer={self.layer}, but the model has layers 0 to {layers - 1}.")
        return self.layer - 1

    def cut(self, model: CutModel) -> Cut:
        return replace(super().cut(model), score=key_norm)

    def keep(self, view: CutView) -> Tensor:
        assert view.scores is not None and view.hidden is not None
        keep = view.real.clone()
        for row, norms in enumerate(view.scores):
            visual = view.visual[row].nonzero()[:, 0]
            kept = self.tokens(len(visual))
            if kept < len(visual):
                text = (view.real[row] & ~view.visual[row]).nonzero()[:, 0]
                states = view.hidden[row].float()
                keep[row, visual] = False
                keep[
                    row, visual[self._least_alike((states[visual], norms[visual]), (states[text], norms[text]), kept)]
                ] = True
        return keep

    def _least_alike(self, visual: tuple[Tensor, Tensor], text: tuple[Tensor, Tensor], kept: int) -> Tensor:
        """Which of the visual tokens stay, int64 [kept]; each pair: hidden states [n, C] and norms of keys [n]."""
        states, norms = visual
        pivots = top_tokens(norms, min(self.visual_pivots, kept))
        others = text[0][top_tokens(text[1], min(self.text_pivots, len(text[1])))]
        references = F.normalize(torch.cat([states[pivots], others]), dim=-1)
        alike = references @ F.normalize(states, dim=-1).mT
        free = torch.ones(len(states), dtype=torch.bool, device=states.device).index_fill(0, pivots, False)
        left = kept - len(pivots)
        for turn, line in enumerate(alike):
            count = -(-left // (len(alike) - turn))
            taken = top_tokens((-line).masked_fill(~free, -torch.inf), count)
            free[taken] = False
            left -= count
        return (~free).nonzero()[:, 0]


def key_norm(last: LastQuery) -> Tensor:
    """Norm of each entry's key, mean over heads: fp32 [B, S]. Rotations of positions leave it as it is."""
    return last.heads.mean(last.key.float().norm(dim=-1).mean(1))
