"""InternVL: blocks of 2 x 2 patches of a tile are shuffled into one token, row by row of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

from torch import Tensor

from llm_accel.errors import UnsupportedCallError
from llm_accel.methods import Downsample
from llm_accel.patches.families.base import VisionFamily
from llm_accel.patches.families.qwen import block_rows
from llm_accel.patches.families.resizing import Places, smaller_pixels


@dataclass(frozen=True)
class PixelShuffle(VisionFamily):
    """Patches of a tile stand in raster order, so those of one token do not follow one another."""

    blocks: str = "encoder.layer"
    prunable: bool = False
    resizable: bool = True

    def cuttable(self, call: dict[str, Any]) -> bool:
        return True

    def units(self, model: Any, call: dict[str, Any], sizes: Sequence[int]) -> list[Tensor]:
        return [block_rows(size, isqrt(size), _side(model)) for size in sizes]

    def patches(self, model: Any, call: dict[str, Any], features: Sequence[Tensor]) -> list[int]:
        return [len(one) * _side(model) ** 2 for one in features]

    def smaller(self, model: Any, call: dict[str, Any], method: Downsample) -> tuple[dict[str, Any], Sequence[Places]]:
        patch, leading = model.config.vision_config.patch_size, int(self.keeps_class(model, call))
        side = patch[0] * _side(model), patch[1] * _side(model)
        pixels, where = smaller_pixels(method, call["pixel_values"], side, leading)
        return call | {"pixel_values": pixels}, where

    def keeps_class(self, model: Any, call: dict[str, Any]) -> bool:
        if super().keeps_class(model, call):
            raise UnsupportedCallError(
                f"vision_feature_select_strategy='full' shuffles the class token of {self.model_type} into the tokens "
                "of patches, so that none stands for a part of the image; give 'default'."
            )
        return False


def _side(model: Any) -> int:
    """Patches of a token in each direction."""
    return int(1 / model.config.downsample_ratio)


INTERNVL = PixelShuffle("internvl")
