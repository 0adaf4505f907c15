"""The models that come with the package, loadable without a network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from llm_accel.assets import NEEDLE, VISION
from llm_accel.errors import ConfigError

Loaded = TypeVar("Loaded")


def needle_model_path() -> Path:
    """Directory of the bundled needle model: a one-million-parameter Llama that only looks up needles.

    It shows whether a method keeps what retrieval needs; it says nothing about the quality of a large model.
    """
    return NEEDLE


def vision_model_path(gaps: bool = True) -> Path:
    """Directory of the bundled vision model: a LLaVA of 1.3 million parameters that knows coloured shapes only.

    It shows whether a method keeps what an answer needs; it says nothing about the quality of a large model.
    ``gaps``: the weights trained with parts of the background removed, as after pruning; False: those before that.
    """
    return VISION if gaps else VISION / "plain"


def load_needle_model(
    dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The bundled needle model in eval mode, and its tokenizer (weights are stored in bf16).

    Raises:
        ConfigError: its files are missing or damaged.
    """

    def load(path: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
        model = LlamaForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        assert isinstance(tokenizer, PreTrainedTokenizerFast)
        return model, tokenizer

    model, tokenizer = _explained("needle", needle_model_path(), load)
    model.to(device)  # type: ignore[arg-type]  # stubs take the method for a wrapped function
    return model.train(False), tokenizer


def load_vision_model(
    dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", gaps: bool = True
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The bundled vision model in eval mode, and its processor (weights are stored in bf16).

    ``gaps``: see :func:`vision_model_path`.

    Raises:
        ConfigError: its files are missing or damaged, or Pillow is not installed.
    """

    def load(path: Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
        model = LlavaForConditionalGeneration.from_pretrained(path, dtype=dtype, local_files_only=True)
        processor = AutoProcessor.from_pretrained(path, local_files_only=True)
        assert isinstance(processor, LlavaProcessor)
        return model, processor

    try:
        model, processor = _explained("vision", vision_model_path(gaps), load)
    except ImportError as error:
        raise ConfigError(
            f"the bundled vision model's processor needs Pillow: {str(error).strip().splitlines()[0]} "
            "Install it with `pip install 'llm_accel[vision]'`."
        ) from error
    model.to(device)  # type: ignore[arg-type]  # stubs take the method for a wrapped function
    return model.train(False), processor


def _explained(name: str, path: Path, load: Callable[[Path], Loaded]) -> Loaded:
    """What ``load`` makes of ``path``; missing or damaged files become a :class:`ConfigError`."""
    try:
        return load(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"the bundled {name} model cannot be loaded from {path}: {str(error).splitlines()[0]} "
            "Reinstall llm_accel, or name another model."
        ) from error
