"""Families of vision-language models: what each must declare, and why some cannot work."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from llm_accel.errors import UnsupportedModelError
from llm_accel.patches.families.anyres import LLAVA_NEXT, LLAVA_NEXT_VIDEO, LLAVA_ONEVISION
from llm_accel.patches.families.base import VisionFamily, attribute, video_lengths
from llm_accel.patches.families.generic import UNTESTED, generic_family
from llm_accel.patches.families.internvl import INTERNVL
from llm_accel.patches.families.llava import LLAVA, VIDEO_LLAVA, VIPLLAVA
from llm_accel.patches.families.qwen import QWEN_LIKE
from llm_accel.patches.families.resizing import Places
from llm_accel.patches.families.siglip import SIGLIP

_LLAVA = (LLAVA, VIPLLAVA, LLAVA_NEXT, LLAVA_NEXT_VIDEO, LLAVA_ONEVISION, VIDEO_LLAVA)
_ALL = (*_LLAVA, *QWEN_LIKE, INTERNVL, *SIGLIP)
FAMILIES: Mapping[str, VisionFamily] = MappingProxyType({family.model_type: family for family in _ALL})

_BLOCKS = "its image tokens attend to each other in both directions, and the masks for that are built for whole images"
_QFORMER = "a Q-Former hands on a fixed number of learned queries, none of which stands for a patch of the image"
_CROSS = "its image is no part of the token sequence: the decoder reads it through cross attention"
REFUSED: Mapping[str, str] = {
    "gemma3": _BLOCKS,
    "paligemma": _BLOCKS,
    "mllama": _CROSS,
    "blip-2": _QFORMER,
    "instructblip": _QFORMER,
    "instructblipvideo": _QFORMER,
}
_NO_CLASS_TOKEN = ("siglip_vision_model", "siglip2_vision_model", "pixtral")


def family_of(model: Any, methods: str) -> VisionFamily:
    """The family of a model.

    Raises:
        UnsupportedModelError: visual tokens cannot be taken out of this model.
    """
    kind = model.config.model_type
    family = FAMILIES.get(kind) or (generic_family(model) if kind not in REFUSED else None)
    known = ", ".join(FAMILIES)
    if family is None:
        sees = hasattr(model.config, "vision_config")
        default = "its images do not go where placeholders stand" if sees else "it sees no images"
        raise UnsupportedModelError(
            f"{methods} acts on visual tokens, not for {kind}: {REFUSED.get(kind, default)}. Supported: {known}."
        )
    if not callable(getattr(model.base_model, "get_image_features", None)):
        raise UnsupportedModelError(
            f"{methods} acts on visual tokens, but {type(model).__name__} has no get_image_features; "
            "give the whole vision-language model."
        )
    tower = getattr(getattr(model.config, "vision_config", None), "model_type", None)
    if family.class_token and tower in _NO_CLASS_TOKEN:
        raise UnsupportedModelError(
            f"{methods} knows {kind} with a vision tower that puts a class token first; this one has a {tower}, "
            "which has none."
        )
    return family


__all__ = ["FAMILIES", "REFUSED", "UNTESTED", "Places", "VisionFamily", "attribute", "family_of", "video_lengths"]
