"""The model of a server."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from llm_accel.common.checkpoints import resolve_model
from llm_accel.common.cpu_linear import use_faster_linear
from llm_accel.common.loading import load_text_model, load_vision_model, short_name
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
    wanted, trusted = settings.model or BUNDLED[0], settings.trust_remote_code
    ours = wanted.startswith(_OURS)
    if ours and wanted not in BUNDLED:
        raise ConfigError("--model: " + unknown_name("bundled model", wanted, BUNDLED))
    sees = wanted == BUNDLED[1] if ours else _sees(wanted, trusted)
    read = load_vision_model if sees else load_text_model
    options = replace(settings, model=None) if ours else settings
    model, reader, _ = read(options, trust_remote_code=trusted, use_safetensors=True)
    use_faster_linear(model)
    name = settings.name or (wanted.removeprefix(_OURS) if ours else short_name(wanted))
    return Served(model, reader.tokenizer if sees else reader, reader if sees else None, name)


def _sees(name: str, trust_remote_code: bool) -> bool:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(resolve_model(name), trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        return False  # loading it says why
    return getattr(config, "vision_config", None) is not None
