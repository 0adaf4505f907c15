"""The models that come with the package, loadable without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    return _load("needle", LlamaForCausalLM, AutoTokenizer, needle_model_path(), dtype, device)


def load_vision_model(
    dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", gaps: bool = True
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The bundled vision model in eval mode, and its processor (weights are stored in bf16).

    ``gaps``: see :func:`vision_model_path`.

    Raises:
        ConfigError: its files are missing or damaged, or Pillow is not installed.
    """
    return _load("vision", LlavaForConditionalGeneration, AutoProcessor, vision_model_path(gaps), dtype, device)


def _load(
    name: str, models: Any, readers: Any, path: Path, dtype: torch.dtype, device: str | torch.device
) -> tuple[Any, Any]:
    try:
        model = models.from_pretrained(path, dtype=dtype, local_files_only=True)
        reader = readers.from_pretrained(path, local_files_only=True)
    except ImportError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"the bundled {name} model's processor needs Pillow: {reason} Install it with "
            "`pip install 'llm_accel[vision]'`."
        ) from error
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"the bundled {name} model cannot be loaded from {path}: {str(error).splitlines()[0]} "
            "Reinstall llm_accel, or name another model."
        ) from error
    return model.to(device).train(False), reader
