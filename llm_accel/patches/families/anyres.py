"""LLaVA-NeXT and LLaVA-OneVision: an image is a small copy of itself and tiles of it, put together again behind the
projector; padding is cut off, and a newline token ends each line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from llm_accel.patches.families.base import VisionFamily, pixels_of, shows_video


@dataclass(frozen=True)
class AnyRes(VisionFamily):
    """Numbers of patches go through the model's own packing, with NaN for newlines.

    Attributes:
        packing: arguments of ``pack_image_features`` that come from the call or else from the configuration.
        counts_images: whether rows with several images do without tiles.
    """

    packing: tuple[str, ...] = ()
    counts_images: bool = False

    def tiles(self, model: Any, call: dict[str, Any]) -> list[int] | None:
        if call.get("image_sizes") is None:  # a video
            return None
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        sizes, counts = call["image_sizes"], call.get("batch_num_images")
        tiled = [True] * len(sizes)
        if self.counts_images and counts is not None:
            tiled = [count == 1 for count in counts for _ in range(count)]
        grid, side = model.config.image_grid_pinpoints, model.config.vision_config.image_size
        return [
            image_size_to_num_patches(size, grid, side) if cut else 1 for size, cut in zip(sizes, tiled, strict=True)
        ]

    def patches(self, model: Any, call: dict[str, Any], features: Sequence[Tensor]) -> list[int]:
        vision, tiles = model.config.vision_config, self.tiles(model, call)
        pictures = math.prod(call[pixels_of(call)].shape[:2]) if tiles is None else sum(tiles)
        return [(vision.image_size // vision.patch_size) ** 2] * pictures

    def packed(self, model: Any, call: dict[str, Any], values: Sequence[Tensor]) -> list[Tensor]:
        stacked, tiles = torch.stack(list(values)), self.tiles(model, call)
        if tiles is None:
            pooled = self.pooled(model, stacked)
            # older versions add the newline of a video later and call the argument as that for images
            newline = self.counts_images and shows_video(call)
            return _frames(pooled, call["pixel_values_videos"].shape[1]) if newline else list(pooled)
        given = {name: call.get(name) or getattr(model.config, name) for name in self.packing}
        packed, _ = model.pack_image_features(
            list(stacked.split(tiles)),
            call["image_sizes"],
            image_newline=stacked.new_full(stacked.shape[-1:], float("nan")),
            **given,
        )
        return list(packed)

    def pooled(self, model: Any, frames: Tensor) -> Tensor:
        """Numbers of the patches of frames, [frames, patches, c], as the model scales them down."""
        return cast(Tensor, model.apply_pooling(frames))


@dataclass(frozen=True)
class NextVideo(AnyRes):
    """LLaVA-NeXT-Video: frames are scaled down by a pooling layer, whatever its kind, before the projector."""

    def cuttable(self, call: dict[str, Any]) -> bool:
        return call.get("image_sizes") is not None

    def pooled(self, model: Any, frames: Tensor) -> Tensor:
        side, stride = math.isqrt(frames.shape[1]), model.config.spatial_pool_stride
        grid = frames.transpose(1, 2).unflatten(2, (side, side))
        return torch.nn.functional.avg_pool2d(grid, stride).flatten(2).transpose(1, 2)


def _frames(pooled: Tensor, frames: int) -> list[Tensor]:
    """Numbers of all frames, [videos * frames, n, c], with the newline that stands behind the last frame of a video."""
    newline = pooled.new_full((1, pooled.shape[-1]), float("nan"))
    return [torch.cat([one, newline]) if index % frames == 0 else one for index, one in enumerate(pooled, start=1)]


LLAVA_NEXT = AnyRes("llava_next", packing=("vision_feature_select_strategy",))
LLAVA_NEXT_VIDEO = NextVideo(
    "llava_next_video",
    prunable=False,
    token_ids=("image_token_id", "video_token_id"),
    packing=("vision_feature_select_strategy",),
)
# tiles of a large image are scaled down behind the tower, which mixes patches: they are chosen after that
LLAVA_ONEVISION = AnyRes(
    "llava_onevision",
    class_token=False,
    prunable=False,
    token_ids=("image_token_id", "video_token_id"),
    packing=("vision_aspect_ratio",),
    counts_images=True,
)
