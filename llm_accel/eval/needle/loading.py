"""The model of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llm_accel.errors import ConfigError
from llm_accel.eval.needle.settings import Settings


def model_name(settings: Settings) -> str:
    """What titles call the model: its id, or the last part of its path."""
    if settings.model is None:
        return "bundled needle model"
    return Path(settings.model).name if Path(settings.model).exists() else settings.model


def load_model(settings: Settings) -> tuple[Any, Any, Settings]:
    """Model in evaluation mode, tokenizer, and the settings with device and dtype as they came out.

    Raises:
        ConfigError: no such device, model or attention implementation.
    """
    device = _device(settings.device)
    dtype: Any = settings.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    if settings.model is None:
        from llm_accel.eval.models.bundled import load_needle_model

        if dtype == "auto":
            dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        model, tokenizer = load_needle_model(dtype, device)
        if settings.attn is not None:
            _set_attention(model, settings.attn)
    else:
        model, tokenizer = _pretrained(settings.model, dtype, device, settings.attn)
    model.eval()
    return model, tokenizer, replace(settings, device=str(device), dtype=str(model.dtype).removeprefix("torch."))


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {name!r} cannot be used: {reason}. Give cpu, cuda or cuda:N.") from error
    return device


def _pretrained(name: str, dtype: Any, device: torch.device, attn: str | None) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if (name.startswith((".", "~", "/")) or name.count("/") > 1) and not Path(name).is_dir():
        raise ConfigError(f"--model {name!r}: no such folder; give a HuggingFace id or a folder with a model.")
    options = {} if attn is None else {"attn_implementation": attn}
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"--model {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    return model.to(device), tokenizer


def _set_attention(model: Any, attn: str) -> None:
    try:
        model.set_attn_implementation(attn)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"--attn {attn!r} cannot be used: {str(error).splitlines()[0]}") from error
