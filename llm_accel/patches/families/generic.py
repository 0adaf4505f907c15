"""Families that nobody has declared, as far as transformers treats them all alike: features take the places of
placeholders, one after the other, and the decoder is causal. Nothing is known of their vision towers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llm_accel.errors import UnsupportedCallError
from llm_accel.patches.families.base import VisionFamily

UNTESTED = "not among the tested families; its feature rows are taken for patches one by one"


@dataclass(frozen=True)
class Generic(VisionFamily):
    """Each row of features is a visual token; whether it stands for a patch is not known."""

    class_token: bool = False
    prunable: bool = False
    declared: bool = False

    def patches(self, model: Any, call: dict[str, Any], features: Sequence[Tensor] | Tensor) -> list[int]:
        if isinstance(features, Tensor) and features.ndim == 2:
            raise UnsupportedCallError(
                f"{self.model_type} gives the features of all images in one piece, and where each ends is not known; "
                "use a method that drops visual tokens between layers (fastv, dyvte)."
            )
        return [len(one) for one in features]


def generic_family(model: Any) -> Generic | None:
    """The family of a model that fits, else None."""
    config, holder = model.config, model.base_model
    names = tuple(name for name in ("image_token_id", "video_token_id") if isinstance(getattr(config, name, None), int))
    fits = hasattr(holder, "get_placeholder_mask") and hasattr(config, "vision_config")
    if not fits or "image_token_id" not in names:
        return None
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return Generic(config.model_type, token_ids=names, axes=3 if "mrope_section" in rope else 1)
