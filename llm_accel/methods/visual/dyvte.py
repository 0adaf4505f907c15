"""DyVTE: from some layer on the text has taken in the image, and all visual tokens leave (arXiv 2411.19628).

The paper picks the layer per prompt, with a small trained network per layer that looks at the text (``routers``).
Without such routers it is one layer for all prompts: measured on samples of the model (``calibration``), or fixed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from llm_accel.errors import ConfigError
from llm_accel.methods.base import LAYERS, MethodInfo, option
from llm_accel.methods.visual.base import Cut, CutModel, CutView, LayerCut
from llm_accel.methods.visual.exit_profile import MAKE, load_exit_profile
from llm_accel.methods.visual.routers import load_routers

FIXED = 0.6


@dataclass(frozen=True)
class DyVTE(LayerCut):
    """Lets all visual tokens leave after one layer; text keeps its positions."""

    exit: float | Literal["calibrated"] | None = option(
        "layer after which visual tokens are dropped, counted from 0; the fraction of the layers that see them, in "
        "(0, 1); or calibrated. None: by routers or calibrated where such a file is given or comes with the model, "
        f"else {FIXED}, which was validated on no model",
        None,
        most=LAYERS,
    )
    calibration: str | None = option("dyvte.json of `llm-accel calibrate dyvte`, or its folder", None)
    routers: str | None = option(
        "routers.safetensors of the same command, or its folder: the layer is chosen per prompt", None
    )

    name: ClassVar[str] = "dyvte"
    info: ClassVar[MethodInfo] = MethodInfo(
        "DyVTE, arXiv 2411.19628",
        "all visual tokens, after a layer that is calibrated, fixed or chosen by trained routers",
        kinds=("vision",),
    )

    def validate(self) -> None:
        exit = self.exit
        if isinstance(exit, float) and not (0.0 < exit < 1.0 or (exit >= 0 and exit.is_integer())):
            self.fail("exit", "a layer index, a fraction of the layers in (0, 1), or 'calibrated'")
        if exit != "calibrated" or self.routers is not None:
            self.at_most_one("routers", "calibration", "exit")

    def after(self, layers: int) -> int:
        """The fixed layer; a calibrated one is known to :meth:`cut` alone."""
        if self.exit == "calibrated" or self.calibration is not None or self.routers is not None:
            raise ConfigError(f"{self.spec()} has no fixed layer: it depends on the model and the prompt.")
        exit = FIXED if self.exit is None else self.exit
        if 0.0 < exit < 1.0:
            return max(0, round(exit * layers) - 1)
        if exit >= layers:
            raise ConfigError(f"dyvte: exit={int(exit)}, but the model has layers 0 to {layers - 1}.")
        return int(exit)

    def keep(self, view: CutView) -> Tensor:
        # a prompt that ends in its image has no text that could have taken it in
        ends_in_image = view.visual[:, -1:]
        return view.real & (~view.visual | ends_in_image)

    def cut(self, model: CutModel) -> Cut:
        if self.routers is not None:
            return self._routed(self.routers, model)
        if isinstance(self.exit, float):
            return super().cut(model)
        found = self.calibration or model.calibration
        if found is not None:
            profile = load_exit_profile(found)
            profile.check(model)
            layers = (profile.exit,) if profile.exit < model.layers - 1 else ()
            chosen = f"layer {profile.exit}" if layers else "no layer was safe"
            return Cut(layers, self.keep, origin=(chosen, profile.origin(model)))
        if self.exit == "calibrated":
            raise ConfigError(
                f"dyvte: exit='calibrated' needs calibration=FILE, and none comes with this {model.name}; make one "
                f"with `{MAKE}`, or give a fixed exit: {FIXED} is a choice that was validated on no model."
            )
        fixed = DyVTE(exit=FIXED).cut(model)
        return Cut(fixed.layers, self.keep, origin=(f"fixed at {FIXED}", f"validated on no model; to measure: {MAKE}"))

    def _routed(self, path: str, model: CutModel) -> Cut:
        routers = load_routers(path)
        routers.check(model)
        layers = tuple(layer for layer in routers.weights if layer >= model.first)
        return Cut(layers, routers.keep, origin=("routers", f"trained on {routers.info.samples} samples"))
