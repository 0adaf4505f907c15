"""Devices and models, with errors that name the argument."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from llm_accel.common.arguments import ModelOptions
from llm_accel.common.checkpoints import resolve_model
from llm_accel.common.launch import DistributedRun
from llm_accel.errors import ConfigError


def short_name(model: str) -> str:
    """What titles call a model: its id, or the last part of its path."""
    return Path(model).name if Path(model).exists() else model


def find_device(name: str) -> torch.device:
    """``auto`` is a GPU if there is one.

    Raises:
        ConfigError: torch has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        _take_own(device, name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {name!r} cannot be used: {reason}. Give cpu, cuda or cuda:N.") from error
    return device


def _take_own(device: torch.device, name: str) -> None:
    """Of several processes of a run each takes the GPU of its number; all of them call it ``cuda``."""
    run = DistributedRun.here()
    if run.world == 1 or device.type != "cuda":
        return
    if ":" in name:
        raise ConfigError(
            f"--device {name!r} puts {run.world} processes on one GPU; give cuda, and each takes its own."
        )
    if run.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"this is process {run.local_rank + 1} on a machine with {torch.cuda.device_count()} GPUs; start no "
            "more processes than there are GPUs."
        )
    torch.cuda.set_device(run.local_rank)


Load = Callable[[torch.dtype, torch.device], tuple[Any, Any]]


def bundled(load: Load, dtype: str, device: torch.device, attn: str | None) -> tuple[Any, Any]:
    """A bundled model and its reader; ``load``: from dtype and device.

    Raises:
        ConfigError: its files are damaged, or it has no such attention implementation.
    """
    automatic = torch.float32 if device.type == "cpu" else torch.bfloat16
    model, reader = load(automatic if dtype == "auto" else getattr(torch, dtype), device)
    if attn is not None:
        set_attention(model, attn)
    return model, reader


def pretrained(
    models: Any,
    readers: Any,
    name: str,
    dtype: str,
    device: torch.device,
    attn: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> tuple[Any, Any]:
    """A model of the auto class ``models``, and its tokenizer or processor of the auto class ``readers``.

    ``name`` may be short for a fetched checkpoint (:func:`~llm_accel.common.checkpoints.resolve_model`); ``dtype`` may
    be "auto"; ``options`` go to ``from_pretrained`` of the model.

    Raises:
        ConfigError: there is no such model, or it cannot be loaded.
    """
    place = resolve_model(name)
    if (name.startswith((".", "~", "/")) or name.count("/") > 1) and not Path(name).is_dir():
        raise ConfigError(f"--model {name!r}: no such folder; give a HuggingFace id or a folder with a model.")
    options |= {"trust_remote_code": trust_remote_code}
    options |= {} if attn is None else {"attn_implementation": attn}
    try:
        reader: Any = readers.from_pretrained(place, trust_remote_code=trust_remote_code)
        kind = dtype if dtype == "auto" else getattr(torch, dtype)
        model: Any = models.from_pretrained(place, dtype=kind, **options)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"--model {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    return model.to(device), reader


def set_attention(model: Any, attn: str) -> None:
    """Changes the attention implementation of a loaded model.

    Raises:
        ConfigError: the model does not have it.
    """
    try:
        model.set_attn_implementation(attn)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"--attn {attn!r} cannot be used: {str(error).splitlines()[0]}") from error


ModelT = TypeVar("ModelT", bound=ModelOptions)


def load_text_model(options: ModelT, **more: Any) -> tuple[Any, Any, ModelT]:
    """Model in evaluation mode, tokenizer, and the options with device and dtype as they came out; ``more`` goes to
    :func:`pretrained`.

    Raises:
        ConfigError: no such device, model or attention implementation.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llm_accel.common.bundled import load_needle_model

    return _loaded(options, load_needle_model, AutoModelForCausalLM, AutoTokenizer, **more)


def load_vision_model(options: ModelT, gaps: bool = True, **more: Any) -> tuple[Any, Any, ModelT]:
    """Model in evaluation mode, processor, and the options as in :func:`load_text_model`; ``gaps``: which weights of
    the bundled model."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from llm_accel.common import bundled as ours

    load = partial(ours.load_vision_model, gaps=gaps)
    return _loaded(options, load, AutoModelForImageTextToText, AutoProcessor, **more)


def _loaded(options: ModelT, ours: Load, models: Any, readers: Any, **more: Any) -> tuple[Any, Any, ModelT]:
    device = find_device(options.device)
    if options.model is None:
        model, reader = bundled(ours, options.dtype, device, options.attn)
    else:
        model, reader = pretrained(models, readers, options.model, options.dtype, device, options.attn, **more)
    return model.eval(), reader, replace(options, device=str(device), dtype=str(model.dtype).removeprefix("torch."))
