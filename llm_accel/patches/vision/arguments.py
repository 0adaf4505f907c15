"""What a model hands to its decoder, and the decoder to its layers: what is not known to be cut with the rows that are
taken out is refused before anything is touched."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from llm_accel.errors import UnsupportedModelError
from llm_accel.patches.families.dry_run import DryRun, dry_run, per_token
from llm_accel.patches.vision.rows import PER_TOKEN

_ROWS = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", *PER_TOKEN}
_DEEPSTACK = {"visual_pos_masks", "deepstack_visual_embeds"}
_SWITCHES = {"self", "past_key_values", "cache", "use_cache", "output_attentions", "output_hidden_states"}
_SWITCHES |= {"return_dict", "logits_to_keep", "labels", "output_router_logits", "cache_position"}
_OF_LAYERS = {"hidden_states", "position_embeddings"}


def layers_of(decoder: Any) -> Sequence[nn.Module]:
    """The layers of a decoder; some models call the decoder together with its head by that name."""
    parts = (part for part in decoder.modules() if isinstance(part, PreTrainedModel))
    found: Any = next((part.layers for part in parts if hasattr(part, "layers")), None)
    if found is None:
        raise UnsupportedModelError(f"{decoder.config.model_type}: its layers are not where a decoder has them.")
    return cast("Sequence[nn.Module]", found)


def check_rows(model: Any, names: str) -> None:
    """For methods that take rows out of the stream of hidden states.

    Raises:
        UnsupportedModelError: the decoder gets something with an entry per token that is not known to be cut with them.
    """
    decoder = model.get_decoder()
    shown = dry_run(model, model.config.image_token_id)
    unknown = set(_given(dry_run(model))) | set(_given(shown))
    if shown.arguments is None:
        unknown |= _parameters(decoder)
    unknown -= _ROWS | _DEEPSTACK | _SWITCHES
    if unknown:
        raise UnsupportedModelError(
            f"{names} takes rows out of what the decoder gets, but that of {model.config.model_type} also gets "
            f"{', '.join(sorted(unknown))}, and which entry belongs to which row is not known. Methods that compress "
            "the KV cache alone can be used."
        )


def check_layers(model: Any, names: str) -> None:
    """For methods that take rows out between two layers.

    Raises:
        UnsupportedModelError: the layers get something that is not known to be cut with them.
    """
    unknown = set().union(*(_parameters(layer) for layer in layers_of(model.get_decoder())))
    unknown -= _ROWS | _SWITCHES | _OF_LAYERS
    if unknown:
        raise UnsupportedModelError(
            f"{names} takes rows out between two layers, but those of {model.config.model_type} also get "
            f"{', '.join(sorted(unknown))}, and which entry belongs to which row is not known."
        )


def check_features(model: Any, names: str) -> None:
    """For methods that mark features which do not reach the decoder.

    Raises:
        UnsupportedModelError: the model does not use them as ``get_image_features`` returns them.
    """
    reads = dry_run(model, model.config.image_token_id).reads
    if reads and "pooler_output" not in reads:
        raise UnsupportedModelError(
            f"{names} marks features in pooler_output of what get_image_features returns, but "
            f"{model.config.model_type} reads {', '.join(sorted(reads))} there and computes on; use a method that "
            "drops visual tokens between layers (fastv, dyvte)."
        )


def check_mask(model: Any) -> None:
    """For all methods: they read who is padding from a mask of the tokens, which no model above may have replaced.

    Raises:
        UnsupportedModelError: the model builds the masks of its decoder itself.
    """
    if model.get_decoder() in (model, model.base_model) or not hasattr(model.config, "vision_config"):
        return
    arguments = dry_run(model).arguments or {}
    mask = arguments.get("attention_mask")
    if isinstance(mask, Mapping) or (mask is not None and mask.ndim != 2):
        raise UnsupportedModelError(
            f"{model.config.model_type} builds the masks of its decoder itself, as models do whose image tokens attend "
            "to each other in both directions; supported are those that give their decoder the mask of the prompt."
        )


def _given(call: DryRun) -> list[str]:
    return [] if call.arguments is None else per_token(call.arguments)


def _parameters(module: nn.Module) -> set[str]:
    """Named parameters of a module's forward."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    return {one.name for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)} - {"self"}
