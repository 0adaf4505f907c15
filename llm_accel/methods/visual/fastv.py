"""FastV: visual tokens that the last query of the prompt hardly attends to leave after an early layer
(arXiv 2403.06764).

At the entrance of layer K the tokens are ranked by the attention that the prompt's last query paid them in layer K - 1,
mean over heads; the best stay, at their original positions. Decided once, in the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from llm_accel.errors import ConfigError
from llm_accel.kernels.column_votes import column_votes
from llm_accel.methods.base import LAYERS, MethodInfo, option
from llm_accel.methods.visual.base import Cut, CutModel, CutView, LastQuery, LayerCut, VisualBudget


@dataclass(frozen=True)
class FastV(VisualBudget, LayerCut):
    """Keeps, from layer ``layer`` on, the visual tokens that the end of the prompt attends to most."""

    layer: int = option(
        "the first layer that sees fewer tokens; ranked by the attention of the one before it", 2, most=LAYERS, least=1
    )

    default_ratio: ClassVar[float] = 0.5
    name: ClassVar[str] = "fastv"
    info: ClassVar[MethodInfo] = MethodInfo(
        "FastV, arXiv 2403.06764", "visual tokens after an early layer", needs_query=True, kinds=("vision",)
    )

    def after(self, layers: int) -> int:
        if self.layer >= layers:
            raise ConfigError(f"fastv: layer={self.layer}, but the model has layers 0 to {layers - 1}.")
        return self.layer - 1

    def keep(self, view: CutView) -> Tensor:
        return view.best(lambda row, tokens: self.tokens(tokens))

    def cut(self, model: CutModel) -> Cut:
        return replace(super().cut(model), score=last_query_attention)


def last_query_attention(last: LastQuery) -> Tensor:
    """What the last query pays to each entry, fp32 [B, S], mean over heads."""
    votes = column_votes(
        last.query,
        last.key,
        last.start,
        heads=last.key.shape[1],
        group="mean",
        scaling=last.scaling,
        softcap=last.softcap,
        sinks=last.sinks,
    )
    return last.heads.mean(votes.mean(1))
