"""LLaVA-NeXT and LLaVA-OneVision: an image is a small copy of itself and tiles of it, put together again behind the
projector; padding is cut off, and a newline token ends each line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm_accel.patches.families.base import VisionFamily


@dataclass(frozen=True)
class AnyRes(VisionFamily):
    """Numbers of patches go through the model's own packing, with NaN for newlines.

    Attributes:
        packing: arguments of ``pack_image_features`` that come from the call or else from the configuration.
        counts_images: whether rows with several images do without tiles.
    """

    packing: tuple[str, ...] = ()
    counts_images: bool = False

    def tiles(self, model: Any, call: dict[str, Any]) -> list[int]:
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
        vision = model.config.vision_config
        return [(vision.image_size // vision.patch_size) ** 2] * sum(self.tiles(model, call))

    def packed(self, model: Any, call: dict[str, Any], values: Sequence[Tensor]) -> list[Tensor]:
        stacked = torch.stack(list(values))[..., None]
        given = {name: call.get(name) or getattr(model.config, name) for name in self.packing}
        packed, _ = model.pack_image_features(
            list(stacked.split(self.tiles(model, call))),
            call["image_sizes"],
            image_newline=stacked.new_full((1,), float("nan")),
            **given,
        )
        return [one[:, 0] for one in packed]


LLAVA_NEXT = AnyRes("llava_next", packing=("vision_feature_select_strategy",))
# tiles of a large image are scaled down behind the tower, which mixes patches: they are chosen after that
LLAVA_ONEVISION = AnyRes(
    "llava_onevision",
    class_token=False,
    prunable=False,
    token_ids=("image_token_id", "video_token_id"),
    packing=("vision_aspect_ratio",),
    counts_images=True,
)
