"""What a method that lets visual tokens leave between layers is told about a model, and its cut on it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from llm_accel.assets import VISION
from llm_accel.errors import ConfigError
from llm_accel.methods import Cut, CutModel, LayerCut, VisualInput, load_exit_profile
from llm_accel.patches.families import VisionFamily
from llm_accel.patches.identity import config_hash, weight_hash

BUNDLED = VISION / "dyvte.json"


def plan_cut(
    model: Any, family: VisionFamily, method: LayerCut | VisualInput, recurrent: Collection[int]
) -> Cut | None:
    """The cut of a method on this model, or that of its second stage, if any. ``recurrent``: layers without attention.

    Raises:
        ConfigError: it has no such layer, adds features to visual tokens after it, or is not the one that a file of
            the method was made for.
    """
    about = cut_model(model, family)
    cut = method.second_stage(about) if isinstance(method, VisualInput) else method.cut(about)
    if cut is None:
        return None
    blind = [layer for layer in cut.layers if layer in recurrent]
    if cut.score is not None and blind:
        others = [layer for layer in range(about.layers) if layer not in recurrent]
        raise ConfigError(
            f"{method.spec()} needs the attention of layer {blind[0]}, but that layer of {about.name} has none: its "
            f"state is recurrent; layers with attention: {', '.join(map(str, others))}."
        )
    if not isinstance(method, VisualInput) and cut.layers and cut.layers[0] < about.first:
        raise ConfigError(
            f"{method.spec()} lets visual tokens leave after layer {cut.layers[0]}, but {about.name} adds features to "
            f"them up to layer {about.first}; choose that layer or a later one."
        )
    return cut


def cut_model(model: Any, family: VisionFamily) -> CutModel:
    """The facts about a model that decide after which layers its visual tokens may leave."""
    config, weights = model.get_decoder().config, weight_hash(model)
    return CutModel(
        name=str(model.config.model_type),
        layers=int(config.num_hidden_layers),
        hidden=int(config.hidden_size),
        first=family.first_cut(model.config),
        config_hash=config_hash(model),
        weights_hash=weights,
        calibration=BUNDLED if BUNDLED.is_file() and load_exit_profile(BUNDLED).weights_hash == weights else None,
    )
