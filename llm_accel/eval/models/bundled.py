"""The models that come with the package, loadable without a network."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from llm_accel.errors import ConfigError


def needle_model_path() -> Path:
    """Directory of the bundled needle model: a one-million-parameter Llama that only looks up needles.

    It shows whether a method keeps what retrieval needs; it says nothing about the quality of a large model.
    """
    return Path(__file__).parent / "needle"


def load_needle_model(
    dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The bundled needle model in eval mode, and its tokenizer (weights are stored in bf16).

    Raises:
        ConfigError: its files are missing or damaged.
    """
    path = needle_model_path()
    try:
        model = LlamaForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"the bundled needle model cannot be loaded from {path}: {str(error).splitlines()[0]} "
            "Reinstall llm_accel, or name another model."
        ) from error
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    model.to(device)  # type: ignore[arg-type]  # stubs take the method for a wrapped function
    return model.train(False), tokenizer
