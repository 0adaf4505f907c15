"""InternVL: blocks of 2 x 2 patches of a tile are shuffled into one token, row by row of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

from torch import Tensor

from llm_accel.methods import Downsample
from llm_accel.patches.families.base import VisionFamily
from llm_accel.patches.families.qwen import blocks_of
from llm_accel.patches.families.resizing import Places, smaller_pixels


@dataclass(frozen=True)
class PixelShuffle(VisionFamily):
    """Patches of a tile stand in raster order, so those of one token do not follow one another."""

    blocks: str = "encoder.layer"
    prunable: bool = False
    merge: int = 4
    resizable: bool = True

    def smaller(self, model: Any, call: dict[str, Any], method: Downsample) -> tuple[dict[str, Any], Sequence[Places]]:
        patch, leading = model.config.vision_config.patch_size, int(self.keeps_class(model, call))
        side = patch[0] * isqrt(self.merge), patch[1] * isqrt(self.merge)
        pixels, where = smaller_pixels(method, call["pixel_values"], side, leading)
        return call | {"pixel_values": pixels}, where

    def packed(self, model: Any, call: dict[str, Any], values: Sequence[Tensor]) -> list[Tensor]:
        return [blocks_of(one, isqrt(len(one)), isqrt(self.merge)) for one in values]


INTERNVL = PixelShuffle("internvl")
