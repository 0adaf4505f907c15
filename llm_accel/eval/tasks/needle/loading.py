"""The model of a run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol, TypeVar

from llm_accel.common.loading import bundled, find_device, pretrained, short_name


class ModelSettings(Protocol):
    """What a run says about its model: name, or None for the bundled one, and how to load it."""

    @property
    def model(self) -> str | None: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def attn(self) -> str | None: ...


SettingsT = TypeVar("SettingsT", bound=ModelSettings)


def model_name(model: str | None) -> str:
    """What titles call the model."""
    return "bundled needle model" if model is None else short_name(model)


def load_model(settings: SettingsT) -> tuple[Any, Any, SettingsT]:
    """Model in evaluation mode, tokenizer, and the settings with device and dtype as they came out.

    Raises:
        ConfigError: no such device, model or attention implementation.
    """
    device = find_device(settings.device)
    if settings.model is None:
        from llm_accel.common.bundled import load_needle_model

        model, tokenizer = bundled(load_needle_model, settings.dtype, device, settings.attn)
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model, tokenizer = pretrained(
            AutoModelForCausalLM, AutoTokenizer, settings.model, settings.dtype, device, settings.attn
        )
    model.eval()
    resolved: Any = replace(settings, device=str(device), dtype=str(model.dtype).removeprefix("torch."))  # type: ignore[type-var]
    return model, tokenizer, resolved
