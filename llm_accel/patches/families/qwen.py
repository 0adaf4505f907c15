"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5 and those built like them (GLM-4V, ERNIE 4.5 VL, VideoLLaMA 3,
PaddleOCR-VL, the thinkers of Qwen2.5-Omni and Qwen3-Omni): no class token; 2 x 2 patches are one token, and follow one
another in all but PaddleOCR-VL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm_accel.errors import UnsupportedCallError
from llm_accel.methods import Downsample
from llm_accel.patches.families.base import VisionFamily, pixels_of, shows_video
from llm_accel.patches.families.resizing import Places, smaller_patches


@dataclass(frozen=True)
class Qwen(VisionFamily):
    """Images of all sizes stand in one row, so each attention call is one image, or one pair of a video's frames."""

    tower: str = "visual"
    blocks: str = "blocks"
    class_token: bool = False
    prunable: bool = False
    packed_rows: bool = True
    mergers: tuple[str, ...] = ("merger",)
    merge: int = 4
    token_ids: tuple[str, ...] = ("image_token_id", "video_token_id")
    two_stages: bool = True
    resizable: bool = True
    axes: int = 3

    def smaller(self, model: Any, call: dict[str, Any], method: Downsample) -> tuple[dict[str, Any], Sequence[Places]]:
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


@dataclass(frozen=True)
class PairedFrames(Qwen):
    """ERNIE 4.5 VL: two frames of a video are one visual token each; an image is its own second frame. Frames do not
    see each other in the tower, so a token of a video would have to leave in two places at once: it does so behind."""

    tower: str = "vision_tower"
    mergers: tuple[str, ...] = ()
    resizable: bool = False

    def cuttable(self, call: dict[str, Any]) -> bool:
        return not shows_video(call)

    def packed(self, model: Any, call: dict[str, Any], values: Sequence[Tensor]) -> list[Tensor]:
        frames = super().packed(model, call, values)
        if not shows_video(call):
            return frames
        joined, start = [], 0
        for count in call[_grids(call)][:, 0].tolist():
            joined += [torch.stack(frames[at : at + 2]).mean(0) for at in range(start, start + count, 2)]
            start += count
        return joined


@dataclass(frozen=True)
class MergedBySize(Qwen):
    """VideoLLaMA 3: the call says how many patches of each image, in each direction, are one token."""

    tower: str = "vision_model"
    blocks: str = "encoder.layers"
    mergers: tuple[str, ...] = ()
    resizable: bool = False

    def units(self, model: Any, call: dict[str, Any], sizes: Sequence[int]) -> list[Tensor]:
        sides = call["video_merge_sizes" if shows_video(call) else "image_merge_sizes"].tolist()
        frames = call[_grids(call)][:, 0].tolist()
        areas = [side * side for side, count in zip(sides, frames, strict=True) for _ in range(count)]
        return [torch.arange(size).view(-1, area) for size, area in zip(sizes, areas, strict=True)]


@dataclass(frozen=True)
class RasterQwen(Qwen):
    """PaddleOCR-VL: patches stand line by line, and blocks of them are merged behind the tower."""

    blocks: str = "vision_model.encoder.layers"
    mergers: tuple[str, ...] = ()
    resizable: bool = False

    def units(self, model: Any, call: dict[str, Any], sizes: Sequence[int]) -> list[Tensor]:
        side = model.config.vision_config.spatial_merge_size
        widths = [columns for frames, _, columns in call[_grids(call)].tolist() for _ in range(frames)]
        return [block_rows(size, width, side) for size, width in zip(sizes, widths, strict=True)]


def blocks_of(values: Tensor, width: int, side: int) -> Tensor:
    """[patches, c] in lines of ``width`` -> [blocks, c]: the mean of each ``side`` x ``side`` patches, line by line."""
    return values[block_rows(len(values), width, side).to(values.device)].mean(1)


def block_rows(count: int, width: int, side: int) -> Tensor:
    """Which of ``count`` patches in lines of ``width`` each block of ``side`` x ``side`` consists of, int64 [blocks,
    side * side], blocks line by line.

    Raises:
        UnsupportedCallError: lines or columns are left over.
    """
    if width % side or count % (width * side):
        raise UnsupportedCallError(
            f"{count} patches in lines of {width} do not make whole blocks of {side} x {side}, which are the tokens of "
            "this model; give images of a size that does."
        )
    return torch.arange(count).view(-1, side, width // side, side).transpose(1, 2).reshape(-1, side * side)


def _grids(call: dict[str, Any]) -> str:
    """Which argument of the call holds the sizes of its images or videos."""
    return "video_grid_thw" if shows_video(call) else "image_grid_thw"


_DEEPSTACK = ("merger", "deepstack_merger_list")
QWEN2_VL = Qwen("qwen2_vl")
QWEN2_5_VL = WindowedQwen("qwen2_5_vl")
QWEN3_VL = Qwen("qwen3_vl", mergers=_DEEPSTACK)
QWEN3_VL_MOE = Qwen("qwen3_vl_moe", mergers=_DEEPSTACK)
GLM4V = Qwen("glm4v", mergers=())  # a convolution has merged the patches before
GLM4V_MOE = Qwen("glm4v_moe", mergers=())
GLM_OCR = Qwen("glm_ocr", mergers=())
GLM46V = Qwen("glm46v", mergers=(), resizable=False)
QWEN2_5_OMNI = WindowedQwen("qwen2_5_omni_thinker", resizable=False)
QWEN3_OMNI = Qwen("qwen3_omni_moe_thinker", mergers=("merger", "merger_list"), resizable=False)
QWEN3_5 = Qwen("qwen3_5", resizable=False)
QWEN3_5_MOE = Qwen("qwen3_5_moe", resizable=False)
ERNIE4_5_VL_MOE = PairedFrames("ernie4_5_vl_moe")
VIDEO_LLAMA_3 = MergedBySize("video_llama_3")
PADDLEOCR_VL = RasterQwen("paddleocr_vl")
_OTHERS = (QWEN2_5_OMNI, QWEN3_OMNI)
_ALIKE = (QWEN2_VL, QWEN2_5_VL, QWEN3_VL, QWEN3_VL_MOE, QWEN3_5, QWEN3_5_MOE, GLM4V, GLM4V_MOE, GLM46V, GLM_OCR)
QWEN_LIKE: tuple[Qwen, ...] = (*_ALIKE, *_OTHERS, ERNIE4_5_VL_MOE, VIDEO_LLAMA_3, PADDLEOCR_VL)
