"""What model and methods must fulfil together; checked before anything is touched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from llm_accel.cache.stock import has_linear_state, is_full
from llm_accel.errors import ConfigError, UnsupportedModelError
from llm_accel.methods import (
    AttentionMethod,
    Grounding,
    LayerCut,
    MethodConfig,
    RetrievalHeads,
    ScoreAndKeep,
    StepEviction,
    VASparse,
    VisualInput,
)
from llm_accel.patches.rotary import why_no_rotary
from llm_accel.patches.wiring import Wiring

_NO_ENTRIES = "keeps no entries of its own"


def decoder_of(model: Any) -> Any:
    """The decoder of a model that can be hooked; :class:`UnsupportedModelError` says why it cannot."""
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"model is a {type(model).__name__}; give the transformers model itself (for a PEFT model "
            "model.get_base_model())."
        )
    family = getattr(model.config, "model_type", type(model).__name__)
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{family} is an encoder-decoder model; supported are decoder-only models.")
    decoder = model.get_decoder()
    config = getattr(decoder, "config", None)
    if not isinstance(decoder, PreTrainedModel) or not hasattr(config, "num_hidden_layers"):
        raise UnsupportedModelError(
            f"{family} has no decoder that can be hooked: its get_decoder() returns a {type(decoder).__name__}, not a "
            "transformers model with num_hidden_layers."
        )
    if any(getattr(part, "is_causal", True) is False for part in decoder.modules() if hasattr(part, "layer_idx")):
        raise UnsupportedModelError(
            f"{family} attends in both directions or to another model; only causal decoders work."
        )
    return decoder


def skipped_layers(decoder: Any, wiring: Wiring, configs: Sequence[MethodConfig], strict: bool) -> dict[int, str]:
    """Layer index -> reason; raises if nothing is left, or with ``strict`` if a model layer is left out."""
    config = decoder.config
    cache_layers = stock_layers(config)
    skipped = {index: _why_not(layer, config) for index, layer in enumerate(cache_layers) if not is_full(layer)}
    if cache_layers and len(skipped) == len(cache_layers):
        reasons = "; ".join(sorted(set(skipped.values())))
        raise UnsupportedModelError(
            f"{config.model_type}: there is nothing to compress, none of the {len(cache_layers)} layers holds a full "
            f"KV cache ({reasons})."
        )
    if strict and skipped:
        raise UnsupportedModelError(
            f"strict=True: layers {sorted(skipped)} of {config.model_type} would be left as they are "
            f"({'; '.join(sorted(set(skipped.values())))}); use strict=False to accept that."
        )
    for index in range(len(cache_layers), config.num_hidden_layers):
        skipped[index] = _NO_ENTRIES
    skipped |= {index: f"reads the entries of layer {source}" for index, source in wiring.readers.items()}
    for method in configs:
        for index in getattr(method, "skip_layers", ()):
            if index >= config.num_hidden_layers:
                raise ConfigError(
                    f"{method.name}: skip_layers={method.skip_layers} names layer {index}; "  # type: ignore[attr-defined]
                    f"{config.model_type} has layers 0 to {config.num_hidden_layers - 1}."
                )
            skipped.setdefault(index, "named in skip_layers")
        if isinstance(method, AttentionMethod):
            for index in range(len(cache_layers)):
                dense = method.dense_layer(index, config.num_hidden_layers)
                if dense is not None and len(configs) == 1:  # another method may act on a layer that this one leaves
                    skipped.setdefault(index, dense)
        if cache_layers and skipped.keys() >= set(range(len(cache_layers))):
            option = "dense_layers" if isinstance(method, AttentionMethod) else "skip_layers"
            raise ConfigError(
                f"{method.name}: {option}={getattr(method, option)} leaves no layer to act on; "
                f"{config.model_type} has layers 0 to {config.num_hidden_layers - 1} "
                f"({'; '.join(sorted(set(skipped.values())))}). Name fewer layers."
            )
    return skipped


def stock_layers(config: Any) -> list[Any]:
    """The cache layers that transformers makes for this configuration."""
    try:
        return list(DynamicCache(config=config).layers)
    except Exception as error:
        raise UnsupportedModelError(
            f"{config.model_type}: transformers makes no DynamicCache for it ({type(error).__name__}: {error}), so "
            "there are no entries to compress."
        ) from error


def check_readers(decoder: Any, wiring: Wiring, configs: Sequence[MethodConfig], splits: bool) -> None:
    """Refuses methods that cannot serve layers which read the entries of others; ``splits``: some heads of a layer keep
    less than others."""
    for config in configs if wiring.readers else ():
        if isinstance(config, LayerCut) or (isinstance(config, VisualInput) and config.always_cuts):
            why = "tokens that leave after one layer would still be among the entries that later layers read"
        elif isinstance(config, RetrievalHeads) and splits:
            why = "the heads of those layers would lose what streaming heads of others drop"
        elif isinstance(config, Grounding):
            why = "what it changes in one layer would have to be known in the others that read the same entries"
        elif isinstance(config, VASparse) and config.attends:
            why = "it weighs entries by the attention of the layer that keeps them"
        else:
            continue
        pairs = ", ".join(f"{reader} those of {source}" for reader, source in wiring.readers.items())
        raise UnsupportedModelError(
            f"{config.spec()} does not work on {decoder.config.model_type}, some of whose layers read the entries of "
            f"earlier ones (layer {pairs}): {why}. Use a method that compresses the prompt, such as snapkv."
        )


def check_derived(decoder: Any, wiring: Wiring, configs: Sequence[MethodConfig], splits: bool) -> None:
    """Refuses methods whose stores are read by kernels of their own, where attention is given something else than what
    is stored; a layer with a single KV head has nothing to share out and is read as it is."""
    several = sorted(layer for layer, heads in wiring.derived.items() if heads > 1)
    for config in configs if several else ():
        if (isinstance(config, RetrievalHeads) and splits) or (isinstance(config, ScoreAndKeep) and config.page_size):
            raise UnsupportedModelError(
                f"{config.spec()} does not work on {decoder.config.model_type}: heads that keep different entries are "
                f"read from their stores directly, and layers {several} attend to what they compute from their "
                "entries. Use a method whose heads keep the same number of entries, such as snapkv."
            )


def check_positions(decoder: Any, wiring: Wiring, configs: Sequence[MethodConfig], skipped: dict[int, str]) -> None:
    """Positions as ranks in the cache need keys that can be turned, in every layer."""
    ranked = next((c for c in configs if isinstance(c, StepEviction) and c.relative_positions), None)
    if ranked is None:
        return
    reason = why_no_rotary(decoder)
    layers = dict(enumerate(stock_layers(decoder.config)))
    others = {index: why for index, why in skipped.items() if not _has_no_positions(layers.get(index))}
    if reason is None and others:
        reason = f"its layers {sorted(others)} keep their own positions ({'; '.join(sorted(set(others.values())))})"
    if reason is None and wiring.derived:
        reason = f"layers {sorted(wiring.derived)} keep latents or the like, from which keys are computed"
    if reason is not None:
        raise UnsupportedModelError(
            f"{ranked.spec()} turns keys to their rank in the cache, which {decoder.config.model_type} does not allow: "
            f"{reason}. Use positions='original'."
        )


def _has_no_positions(layer: Any) -> bool:
    """Whether a layer of the cache holds a linear-attention state and nothing else."""
    return has_linear_state(layer) and not isinstance(layer, CacheLayerMixin)


def _why_not(layer: Any, config: Any) -> str:
    if getattr(layer, "is_sliding", False):
        return f"sliding window of {getattr(config, 'sliding_window', '?')} tokens bounds its cache already"
    if has_linear_state(layer):
        return "linear attention: its state has a fixed size and is left alone"
    if not isinstance(layer, CacheLayerMixin):
        return _NO_ENTRIES
    return f"{type(layer).__name__} is not a full-attention cache"
