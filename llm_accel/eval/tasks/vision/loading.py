"""The model of a vision run."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from llm_accel.common.loading import bundled, find_device, pretrained, short_name
from llm_accel.eval.tasks.vision.settings import Settings


def model_name(settings: Settings) -> str:
    """What titles call the model."""
    if settings.model is not None:
        return short_name(settings.model)
    return "bundled vision model" if settings.gaps else "bundled vision model without gaps in training"


def load_model(settings: Settings) -> tuple[Any, Any, Settings]:
    """Model in evaluation mode, processor, and the settings with device and dtype as they came out.

    Raises:
        ConfigError: no such device, model or attention implementation.
    """
    device = find_device(settings.device)
    if settings.model is None:
        from llm_accel.common.bundled import load_vision_model

        load = partial(load_vision_model, gaps=settings.gaps)
        model, processor = bundled(load, settings.dtype, device, settings.attn)
    else:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        model, processor = pretrained(
            AutoModelForImageTextToText, AutoProcessor, settings.model, settings.dtype, device, settings.attn
        )
    model.eval()
    return model, processor, replace(settings, device=str(device), dtype=str(model.dtype).removeprefix("torch."))
