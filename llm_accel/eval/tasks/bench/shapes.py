"""Models by their geometry, with random weights: speed and memory do not depend on what a model has learned."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llm_accel.errors import ConfigError, unknown_name

SHAPES: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("shapes.json").read_text(encoding="utf-8"))
"""The numbers of a configuration, as ``config.json`` of a checkpoint has them."""


def shape_config(name: str, changes: Sequence[str] = ()) -> Any:
    """The configuration of a named geometry.

    Args:
        changes: ``key=value`` overrides, for a vision-language model of its text part.

    Raises:
        ConfigError: no such shape or key, or a value that the configuration refuses.
    """
    from transformers import AutoConfig

    if name not in SHAPES:
        raise ConfigError("--shape: " + unknown_name("value", name, SHAPES))
    config = AutoConfig.for_model(**SHAPES[name])
    text = config.get_text_config()
    known = [key for key in text.to_dict() if not key.startswith("_")]
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise ConfigError(f"--set {change!r} is not of the form key=value.")
        if key not in known:
            raise ConfigError("--set: " + unknown_name("key", key, known))
        try:
            setattr(text, key, _parsed(value))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"--set {change!r} is not allowed: {str(error).splitlines()[0]}") from error
    if "head_dim" not in {change.partition("=")[0] for change in changes} and getattr(text, "head_dim", None):
        sizes = {"hidden_size", "num_attention_heads"} & {change.partition("=")[0] for change in changes}
        if sizes:
            text.head_dim = text.hidden_size // text.num_attention_heads
    return config


def _parsed(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def build(config: Any, dtype: torch.dtype, device: torch.device, attn: str | None, seed: int) -> Any:
    """A model of this configuration in evaluation mode, weights drawn on the device from ``seed``."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind: Any = AutoModelForCausalLM if config.get_text_config() is config else AutoModelForImageTextToText
    options = {} if attn is None else {"attn_implementation": attn}
    torch.manual_seed(seed)
    try:
        with torch.device(device):
            model = kind.from_config(config, dtype=dtype, **options)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"the model cannot be built: {str(error).splitlines()[0]}") from error
    model.generation_config.pad_token_id = 0
    return model.to(device).eval()
