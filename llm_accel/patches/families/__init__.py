"""Families of vision-language models: what each must declare, and why some cannot work."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from llm_accel.errors import UnsupportedModelError
from llm_accel.patches.families.anyres import LLAVA_NEXT, LLAVA_ONEVISION
from llm_accel.patches.families.base import VisionFamily, attribute
from llm_accel.patches.families.internvl import INTERNVL
from llm_accel.patches.families.llava import LLAVA, VIPLLAVA
from llm_accel.patches.families.qwen import QWEN2_5_VL, QWEN2_VL, QWEN3_VL

_ALL = (LLAVA, VIPLLAVA, LLAVA_NEXT, LLAVA_ONEVISION, QWEN2_VL, QWEN2_5_VL, QWEN3_VL, INTERNVL)
FAMILIES: Mapping[str, VisionFamily] = MappingProxyType({family.model_type: family for family in _ALL})

_BLOCKS = "its image tokens attend to each other in both directions, and the masks for that are built for whole images"
_QFORMER = "a Q-Former hands on a fixed number of learned queries, none of which stands for a patch of the image"
_CROSS = "its image is no part of the token sequence: the decoder reads it through cross attention"
_REFUSED = {
    "gemma3": _BLOCKS,
    "gemma3n": _BLOCKS,
    "mllama": _CROSS,
    "blip-2": _QFORMER,
    "instructblip": _QFORMER,
    "instructblipvideo": _QFORMER,
}


def family_of(model: Any, methods: str) -> VisionFamily:
    """The family of a model.

    Raises:
        UnsupportedModelError: visual tokens cannot be taken out of this model, or nobody has tried.
    """
    kind = model.config.model_type
    family = FAMILIES.get(kind)
    known = ", ".join(FAMILIES)
    if family is None:
        default = "this family is not supported yet" if hasattr(model.config, "vision_config") else "it sees no images"
        raise UnsupportedModelError(
            f"{methods} acts on visual tokens, not for {kind}: {_REFUSED.get(kind, default)}. Supported: {known}."
        )
    if not callable(getattr(model.base_model, "get_image_features", None)):
        raise UnsupportedModelError(
            f"{methods} acts on visual tokens, but {type(model).__name__} has no get_image_features; "
            "give the whole vision-language model."
        )
    return family


__all__ = ["FAMILIES", "VisionFamily", "attribute", "family_of"]
