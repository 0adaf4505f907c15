"""Which of transformers' cache layers a method can act on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer, LinearAttentionCacheLayerMixin


def is_full(layer: Any) -> bool:
    """Whether this stock layer holds every entry of full attention, beside a linear-attention state or not."""
    return type(layer) in (DynamicLayer, LinearAttentionAndFullAttentionLayer)


def windows_of(layers: Sequence[Any]) -> dict[int, int]:
    """Tokens of the sliding window of each stock layer that has one, by index."""
    return {index: layer.sliding_window for index, layer in enumerate(layers) if getattr(layer, "is_sliding", False)}


def has_linear_state(layer: Any) -> bool:
    """Whether a linear-attention (state-space, convolution) state lies in this layer."""
    return isinstance(layer, LinearAttentionCacheLayerMixin)
