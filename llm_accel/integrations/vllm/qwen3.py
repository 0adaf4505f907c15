"""Qwen3-VL: features of deeper layers of the tower are further columns of each row, which leave with it."""

from __future__ import annotations

from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from llm_accel.integrations.vllm.mrope import MropeInfo, MropeModel, MropeProcessor


class Qwen3Info(MropeInfo, Qwen3VLProcessingInfo):
    """Counts fewer tokens."""


class Qwen3Processor(MropeProcessor, Qwen3VLMultiModalProcessor):
    """Writes fewer placeholders."""


@MULTIMODAL_REGISTRY.register_processor(Qwen3Processor, info=Qwen3Info, dummy_inputs=Qwen3VLDummyInputsBuilder)
class AccelQwen3(MropeModel, Qwen3VLForConditionalGeneration):
    """Loads and runs as the class whose place it takes; the features of images are fewer."""
