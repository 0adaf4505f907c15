"""Qwen2.5-VL: most layers of its tower see windows of an image; those that see all of it give the scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from llm_accel.integrations.vllm.mrope import MropeInfo, MropeModel, MropeProcessor


class Qwen2_5Info(MropeInfo, Qwen2_5_VLProcessingInfo):
    """Counts fewer tokens."""


class Qwen2_5Processor(MropeProcessor, Qwen2_5_VLMultiModalProcessor):
    """Writes fewer placeholders."""


@MULTIMODAL_REGISTRY.register_processor(Qwen2_5Processor, info=Qwen2_5Info, dummy_inputs=Qwen2_5_VLDummyInputsBuilder)
class AccelQwen2_5(MropeModel, Qwen2_5_VLForConditionalGeneration):
    """Loads and runs as the class whose place it takes; the features of images are fewer."""

    @property
    def looked_at(self) -> Sequence[int]:
        return sorted(self.visual.fullatt_block_indexes)

    def raster(self, marks: Tensor, grids: list[list[int]]) -> Tensor:
        order: Tensor = self.visual.prepare_encoder_metadata(grids)["reverse_indices"]
        return marks[order.to(marks.device, torch.int64)]
