"""LLaVA-1.5: CLIP, the features of one layer, the class token left out. VipLLaVA: those of several layers. Video-LLaVA:
a second tower for videos, frame by frame, where the class token is one of the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llm_accel.methods import Downsample
from llm_accel.patches.families.base import VisionFamily, pixels_of, shows_video
from llm_accel.patches.families.resizing import Places, smaller_pixels


@dataclass(frozen=True)
class Clip(VisionFamily):
    """One size of image; for others the position embeddings are interpolated, which the tower does when told to."""

    resizable: bool = True

    def smaller(self, model: Any, call: dict[str, Any], method: Downsample) -> tuple[dict[str, Any], Sequence[Places]]:
        patch, leading = model.config.vision_config.patch_size, int(self.keeps_class(model, call))
        name = pixels_of(call)
        full = call[name]
        pixels, where = smaller_pixels(method, full.flatten(0, -4), (patch, patch), leading)
        if pixels.shape[-2:] == full.shape[-2:]:
            return call, where
        pixels = pixels.view(*full.shape[:-2], *pixels.shape[-2:])
        return call | {name: pixels, "interpolate_pos_encoding": True}, where


@dataclass(frozen=True)
class VideoClip(Clip):
    """Videos go through a tower of their own."""

    def keeps_class(self, model: Any, call: dict[str, Any]) -> bool:
        return shows_video(call) or super().keeps_class(model, call)


LLAVA = Clip("llava")
VIPLLAVA = Clip("vipllava", prunable=False)
VIDEO_LLAVA = VideoClip(
    "video_llava", tower="image_tower", video_tower="video_tower", token_ids=("image_token_id", "video_token_id")
)
