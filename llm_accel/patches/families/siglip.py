"""Families on SigLIP towers, which have no class token and give all patches of an image of one size, line by line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

from torch import Tensor

from llm_accel.patches.families.base import VisionFamily, attribute
from llm_accel.patches.families.qwen import block_rows, blocks_of


@dataclass(frozen=True)
class Siglip(VisionFamily):
    """DeepSeek-VL and Janus: each patch is a visual token."""

    tower: str = "vision_model"
    class_token: bool = False
    prunable: bool = False

    def cuttable(self, call: dict[str, Any]) -> bool:
        return True


@dataclass(frozen=True)
class Blocks(Siglip):
    """Idefics 3, SmolVLM and Ovis 2: blocks of patches are one token. Tiles of an image are images of their own.

    Attributes:
        side: path from the configuration to the side of a block, in patches.
    """

    side: str = "scale_factor"

    def units(self, model: Any, call: dict[str, Any], sizes: Sequence[int]) -> list[Tensor]:
        return [block_rows(size, isqrt(size), self._side(model)) for size in sizes]

    def patches(self, model: Any, call: dict[str, Any], features: Sequence[Tensor]) -> list[int]:
        patch = model.config.vision_config.patch_size
        height, width = call["pixel_values"].shape[-2:]
        count, area = (height // patch) * (width // patch), self._side(model) ** 2
        return [count] * (sum(len(one) for one in features) * area // count)

    def _side(self, model: Any) -> int:
        return int(attribute(model.config, self.side))


@dataclass(frozen=True)
class Padded(Siglip):
    """LFM2-VL: images of all sizes, line by line, padded at the end to as many patches as the largest may have."""

    tower: str = "vision_tower"
    pads: bool = True

    def cuttable(self, call: dict[str, Any]) -> bool:
        return False

    def packed(self, model: Any, call: dict[str, Any], values: Sequence[Tensor]) -> list[Tensor]:
        side, sizes = int(model.config.downsample_factor), call["spatial_shapes"].tolist()
        return [
            blocks_of(one[: height * width], width, side) for one, (height, width) in zip(values, sizes, strict=True)
        ]

    def patches(self, model: Any, call: dict[str, Any], features: Sequence[Tensor]) -> list[int]:
        images, count = call["pixel_values"].shape[:2]
        return [count] * images


DEEPSEEK_VL = Siglip("deepseek_vl")
JANUS = Siglip("janus")
IDEFICS3 = Blocks("idefics3")
SMOLVLM = Blocks("smolvlm")
OVIS2 = Blocks("ovis2", tower="vision_tower", blocks="transformer.encoder.layers", side="vision_config.hidden_stride")
LFM2_VL = Padded("lfm2_vl")
SIGLIP = (DEEPSEEK_VL, JANUS, IDEFICS3, SMOLVLM, OVIS2, LFM2_VL)
