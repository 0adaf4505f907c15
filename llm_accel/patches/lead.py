"""What a model is told before it reads a context again, by the tokenizer that lies with its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer

from llm_accel.errors import ConfigError
from llm_accel.methods import ContextCompression, Lead, MethodConfig


def lead_of(model: Any, configs: Sequence[MethodConfig]) -> Lead:
    """Of the method that has a context read again; nothing where no method does.

    Raises:
        ConfigError: no tokenizer lies with the weights of a model that needs one, or a token id is none of the model's.
    """
    config = next((config for config in configs if isinstance(config, ContextCompression)), None)
    if config is None:
        return Lead()
    lead = config.lead(_tokenizer(model, config) if config.needs_tokenizer else None)
    known = int(model.get_input_embeddings().weight.shape[0])
    unknown = [token for token in (*lead.first, *lead.later, *lead.behind) if token >= known]
    if unknown:
        raise ConfigError(
            f"{config.spec()}: prompt has token {unknown[0]}; {model.config.model_type} knows 0 to {known - 1}."
        )
    return lead


def _tokenizer(model: Any, config: MethodConfig) -> Any:
    place = getattr(model, "name_or_path", "")
    try:
        if not place:
            raise OSError("the model was not loaded from a place")
        return AutoTokenizer.from_pretrained(place, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        said = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{config.spec()}: prompt='text' needs the tokenizer that lies with the weights of the model, and there is "
            f"none ({said.rstrip('.')}); give token ids as prompt, or prompt='none'."
        ) from error
