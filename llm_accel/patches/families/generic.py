"""Families without a declaration, as far as transformers treats them all alike: features take the places of
placeholders, one after the other, and the decoder is causal. Nothing is known of their vision towers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llm_accel.errors import UnsupportedCallError
from llm_accel.patches.families.base import VisionFamily, pixels_of, shows_video
from llm_accel.patches.families.dry_run import dry_run

_SIZES = ("image_sizes", "target_sizes", "spatial_shapes")
UNTESTED = "not among the tested families; its feature rows are taken for patches one by one"


@dataclass(frozen=True)
class Generic(VisionFamily):
    """Each row of features is a visual token; whether it stands for a patch is not known."""

    class_token: bool = False
    prunable: bool = False
    declared: bool = False

    def patches(self, model: Any, call: dict[str, Any], features: Sequence[Tensor] | Tensor) -> list[int]:
        joined = isinstance(features, Tensor) and features.ndim == 2
        lengths = [len(features)] if joined else [len(one) for one in features]
        shares, total = _shares(call), sum(lengths)
        if not joined and len(shares) <= len(lengths):
            return lengths
        if not shares or any(share * total % sum(shares) for share in shares):
            raise UnsupportedCallError(
                f"{self.model_type} returns the features of all images as one tensor without saying where each ends; "
                "use a method that drops visual tokens between layers (fastv, dyvte)."
            )
        return [share * total // sum(shares) for share in shares]


def _shares(call: dict[str, Any]) -> list[int]:
    """What part of all features each image of a call has, in whole numbers; empty where that is not known."""
    name = pixels_of(call)
    grids, pixels = call.get("video_grid_thw" if shows_video(call) else "image_grid_thw"), call[name]
    if grids is not None:
        return [int(size) for size in grids.prod(-1)]
    if pixels.ndim < 4 or any(size in call and call[size] is not None for size in _SIZES):
        return []
    images = pixels.flatten(0, -4)
    return [1] * int((images != 0).flatten(1).any(-1).sum())  # images of zeros fill up rows with fewer of them


def generic_family(model: Any) -> Generic | None:
    """The family of a model that fits, else None."""
    config, holder = model.config, model.base_model
    names = tuple(name for name in ("image_token_id", "video_token_id") if isinstance(getattr(config, name, None), int))
    if "image_token_id" not in names or not hasattr(config, "vision_config"):
        return None
    embeds = dry_run(model, config.image_token_id).embeds
    if not (hasattr(holder, "get_placeholder_mask") if embeds is None else embeds):
        return None
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return Generic(config.model_type, token_ids=names, axes=3 if "mrope_section" in rope else 1)
