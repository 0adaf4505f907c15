"""DyVTE: from some layer on the text has taken in the image, and all visual tokens leave (arXiv 2411.19628).

Here the layer is fixed by the user. The paper picks it per prompt with a trained router.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llm_accel.errors import ConfigError
from llm_accel.methods.base import MethodInfo, option
from llm_accel.methods.visual import CutView, LayerCut


@dataclass(frozen=True)
class DyVTE(LayerCut):
    """Lets all visual tokens leave after one layer; text keeps its positions."""

    exit: float = option(
        "the layer after which visual tokens leave, counted from 0, or the fraction of the layers that see them, in "
        "(0, 1); the default was validated on no model",
        0.6,
    )

    name: ClassVar[str] = "dyvte"
    info: ClassVar[MethodInfo] = MethodInfo(
        paper="DyVTE, arXiv 2411.19628",
        cuts="all visual tokens after one layer",
        needs_query=False,
        frees_memory=True,
        kinds=("vision",),
    )

    def validate(self) -> None:
        if not (0.0 < self.exit < 1.0 or (self.exit >= 0 and self.exit.is_integer())):
            self.fail("exit", "a layer index or a fraction of the layers in (0, 1)")

    def after(self, layers: int) -> int:
        if 0.0 < self.exit < 1.0:
            return max(0, round(self.exit * layers) - 1)
        if self.exit >= layers:
            raise ConfigError(f"dyvte: exit={int(self.exit)}, but the model has layers 0 to {layers - 1}.")
        return int(self.exit)

    def keep(self, view: CutView) -> Tensor:
        # a prompt that ends in its image has no text that could have taken it in
        ends_in_image = view.visual[:, -1:]
        return view.real & (~view.visual | ends_in_image)
