"""FastV: visual tokens that the last query of the prompt hardly attends to leave after an early layer
(arXiv 2403.06764).

At the entrance of layer K the tokens are ranked by the attention that the prompt's last query paid them in layer K - 1,
mean over heads; the best stay, at their original positions. Decided once, in the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llm_accel.errors import ConfigError
from llm_accel.methods.base import MethodInfo, option
from llm_accel.methods.selection import top_tokens
from llm_accel.methods.visual import CutView, LayerCut, VisualBudget


@dataclass(frozen=True)
class FastV(VisualBudget, LayerCut):
    """Keeps, from layer ``layer`` on, the visual tokens that the end of the prompt attends to most."""

    layer: int = option("the first layer that sees fewer tokens; ranked by the attention of the one before it", 2)

    default_ratio: ClassVar[float] = 0.5
    name: ClassVar[str] = "fastv"
    info: ClassVar[MethodInfo] = MethodInfo(
        paper="FastV, arXiv 2403.06764",
        cuts="visual tokens after an early layer",
        needs_query=True,
        frees_memory=True,
        kinds=("vision",),
    )

    def validate(self) -> None:
        if self.layer < 1:
            self.fail("layer", "a layer index of at least 1")
        super().validate()

    @property
    def needs_attention(self) -> bool:
        return True

    def after(self, layers: int) -> int:
        if self.layer >= layers:
            raise ConfigError(f"fastv: layer={self.layer}, but the model has layers 0 to {layers - 1}.")
        return self.layer - 1

    def keep(self, view: CutView) -> Tensor:
        assert view.attention is not None
        keep = view.real.clone()
        for row, attention in enumerate(view.attention):
            tokens = view.visual[row].nonzero()[:, 0]
            keep[row, tokens] = False
            keep[row, tokens[top_tokens(attention[tokens], self.tokens(len(tokens)))]] = True
        return keep
