"""The model of a server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from llm_accel.common.checkpoints import resolve_model
from llm_accel.common.cpu_linear import use_faster_linear
from llm_accel.common.loading import bundled, find_device, pretrained, short_name
from llm_accel.errors import ConfigError, unknown_name
from llm_accel.serve.settings import ServeSettings

_OURS = "bundled:"
BUNDLED = (f"{_OURS}needle", f"{_OURS}vision")  # the first one where no model is named


@dataclass(frozen=True)
class Served:
    """What is served.

    Attributes:
        model: in evaluation mode.
        tokenizer: turns text into ids and back; that of the processor if there is one.
        processor: prepares images; None for a text model.
        name: what the API calls the model.
    """

    model: Any
    tokenizer: Any
    processor: Any
    name: str


def load(settings: ServeSettings) -> Served:
    """Loads the model. Weights are read from safetensors files only: other formats can run code.

    Raises:
        ConfigError: no such device, model or attention implementation; no Pillow for the bundled vision model.
    """
    served = _load(settings)
    use_faster_linear(served.model)
    return served


def _load(settings: ServeSettings) -> Served:
    device = find_device(settings.device)
    wanted = settings.model or BUNDLED[0]
    if wanted.startswith(_OURS):
        return _bundled(settings, wanted, device)
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    sees = _sees(wanted, settings.trust_remote_code)
    model, reader = pretrained(
        AutoModelForImageTextToText if sees else AutoModelForCausalLM,
        AutoProcessor if sees else AutoTokenizer,
        wanted,
        settings.dtype,
        device,
        settings.attn,
        trust_remote_code=settings.trust_remote_code,
        use_safetensors=True,
    )
    name = settings.name or short_name(wanted)
    return Served(model.eval(), reader.tokenizer if sees else reader, reader if sees else None, name)


def _bundled(settings: ServeSettings, name: str, device: torch.device) -> Served:
    from llm_accel.common.bundled import load_needle_model, load_vision_model

    if name not in BUNDLED:
        raise ConfigError("--model: " + unknown_name("bundled model", name, BUNDLED))
    sees = name == BUNDLED[1]
    load = load_vision_model if sees else load_needle_model
    model, reader = bundled(load, settings.dtype, device, settings.attn)
    tokenizer = reader.tokenizer if sees else reader
    return Served(model, tokenizer, reader if sees else None, settings.name or name.removeprefix(_OURS))


def _sees(name: str, trust_remote_code: bool) -> bool:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(resolve_model(name), trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        return False  # loading it says why
    return getattr(config, "vision_config", None) is not None
