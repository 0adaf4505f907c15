"""Models by their geometry, with random weights: speed and memory do not depend on what a model has learned."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from llm_accel.errors import ConfigError, unknown_name

_LLAMA_3: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
_LLAMA_3_LARGE: dict[str, Any] = {
    **_LLAMA_3,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
_QWEN_3: dict[str, Any] = {
    **_LLAMA_3,
    "vocab_size": 151936,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}
_LLAMA_2: dict[str, Any] = {
    **_LLAMA_3,
    "vocab_size": 32000,
    "intermediate_size": 11008,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
}
_SMALL: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
}
_CLIP_L: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}


def _llama(numbers: Mapping[str, Any]) -> Callable[[], Any]:
    def config() -> Any:
        from transformers import LlamaConfig

        return LlamaConfig(**numbers)

    return config


def _qwen3() -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(**_QWEN_3)


def _llava() -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    return LlavaConfig(
        text_config=LlamaConfig(**_LLAMA_2 | {"vocab_size": 32064}),
        vision_config=CLIPVisionConfig(**_CLIP_L),
        image_token_index=32000,
    )


SHAPES: dict[str, Callable[[], Any]] = {
    "small": _llama(_SMALL),
    "llama-3.1-8b": _llama(_LLAMA_3),
    "llama-3.1-70b": _llama(_LLAMA_3_LARGE),
    "qwen3-8b": _qwen3,
    "llama-2-7b": _llama(_LLAMA_2),
    "llava-1.5-7b": _llava,
}


def shape_config(name: str, changes: Sequence[str] = ()) -> Any:
    """The configuration of a named geometry.

    Args:
        changes: ``key=value`` overrides, for a vision-language model of its text part.

    Raises:
        ConfigError: no such shape or key, or a value that the configuration refuses.
    """
    if name not in SHAPES:
        raise ConfigError("--shape: " + unknown_name("value", name, SHAPES))
    config = SHAPES[name]()
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
