"""What a model is told before it reads a context again, by the tokenizer that lies with its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer

from llm_accel.errors import ConfigError
from llm_accel.methods import ContextCompression, Lead, MethodConfig


def lead_of(model: Any, configs: Sequence[MethodConfig]) -> tuple[Lead, dict[str, tuple[str, str]]]:
    """Of the method that has a context read again, and what the report says about it; nothing where no method does.

    Raises:
        ConfigError: no tokenizer lies with the weights of a model that needs one, or a token id is none of the model's.
    """
    config = next((config for config in configs if isinstance(config, ContextCompression)), None)
    if config is None:
        return Lead(), {}
    tokenizer, reason = _tokenizer(model) if config.tokenizer_use != "none" else (None, "as asked for")
    if tokenizer is None and config.tokenizer_use == "required":
        raise ConfigError(
            f"{config.spec()}: prompt='text' needs the tokenizer that lies with the weights of the model, and there is "
            f"none ({reason}); give token ids as prompt, or prompt='none'."
        )
    lead = config.lead(tokenizer)
    known = int(model.get_input_embeddings().weight.shape[0])
    unknown = [token for token in (*lead.first, *lead.later, *lead.behind) if token >= known]
    if unknown:
        raise ConfigError(
            f"{config.spec()}: prompt has token {unknown[0]}; {model.config.model_type} knows 0 to {known - 1}."
        )
    return lead, {"repeat prompt": (f"{len(lead.first)} tokens" if lead.first else "none", reason)}


def _tokenizer(model: Any) -> tuple[Any, str]:
    """The tokenizer that lies with the weights and where that is, or None and why there is none."""
    place = getattr(model, "name_or_path", "")
    if not place:
        return None, "the model was not loaded from a place"
    try:
        return AutoTokenizer.from_pretrained(
            place, local_files_only=True
        ), "by the tokenizer that lies with the weights"
    except (OSError, ValueError, ImportError) as error:
        return None, str(error).strip().splitlines()[0].rstrip(".")
