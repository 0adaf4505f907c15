"""InternVL: blocks of 2 x 2 patches of a tile are shuffled into one token, row by row of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

from torch import Tensor

from llm_accel.patches.families.base import VisionFamily


@dataclass(frozen=True)
class PixelShuffle(VisionFamily):
    """Patches of a tile stand in raster order, so those of one token do not follow one another."""

    blocks: str = "encoder.layer"
    prunable: bool = False
    merge: int = 4

    def packed(self, model: Any, call: dict[str, Any], values: Sequence[Tensor]) -> list[Tensor]:
        side = isqrt(self.merge)
        grids = [one.view(isqrt(len(one)) // side, side, -1, side) for one in values]
        return [grid.mean((1, 3)).flatten() for grid in grids]


INTERNVL = PixelShuffle("internvl")
