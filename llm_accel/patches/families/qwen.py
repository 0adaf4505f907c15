"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: no class token; 2 x 2 patches, which follow one another, are one token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm_accel.methods import SmallerImage
from llm_accel.patches.families.base import VisionFamily, pixels_of, shows_video
from llm_accel.patches.families.resizing import Places, smaller_patches


@dataclass(frozen=True)
class Qwen(VisionFamily):
    """Images of all sizes stand in one row, so each attention call is one image, or one pair of a video's frames."""

    tower: str = "visual"
    blocks: str = "blocks"
    class_token: bool = False
    prunable: bool = False
    merge: int = 4
    token_ids: tuple[str, ...] = ("image_token_id", "video_token_id")
    resizable: bool = True
    axes: int = 3

    def smaller(
        self, model: Any, call: dict[str, Any], method: SmallerImage
    ) -> tuple[dict[str, Any], Sequence[Places]]:
        vision, name, sizes = model.config.vision_config, pixels_of(call), _grids(call)
        pixels, grids, where = smaller_patches(
            method, call[name], call[sizes], vision.patch_size, vision.spatial_merge_size
        )
        return call | {name: pixels, sizes: grids}, where

    def patches(self, model: Any, call: dict[str, Any], features: Sequence[Tensor]) -> list[int]:
        return [rows * columns for frames, rows, columns in call[_grids(call)].tolist() for _ in range(frames)]


@dataclass(frozen=True)
class WindowedQwen(Qwen):
    """Most layers see windows only, and inside the tower tokens stand in the order of the windows."""

    def full_blocks(self, model: Any) -> tuple[int, ...]:
        return tuple(model.visual.fullatt_block_indexes)

    def packed(self, model: Any, call: dict[str, Any], values: Sequence[Tensor]) -> list[Tensor]:
        from transformers.vision_utils import get_vision_window_index

        tower = model.visual
        order = get_vision_window_index(
            call[_grids(call)], tower.spatial_merge_size, tower.window_size, tower.patch_size
        )[0]
        tokens = torch.cat(super().packed(model, call, values))
        lengths = [len(one) // self.merge for one in values]
        return list(tokens[order.to(tokens.device).argsort()].split(lengths))


def _grids(call: dict[str, Any]) -> str:
    """Which argument of the call holds the sizes of its images or videos."""
    return "video_grid_thw" if shows_video(call) else "image_grid_thw"


QWEN2_VL = Qwen("qwen2_vl")
QWEN2_5_VL = WindowedQwen("qwen2_5_vl")
QWEN3_VL = Qwen("qwen3_vl")
