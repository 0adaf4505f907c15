"""Which of transformers' cache layers a method can act on."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer, LinearAttentionCacheLayerMixin


def is_full(layer: Any) -> bool:
    """Whether this stock layer holds every entry of full attention, beside a linear-attention state or not."""
    return type(layer) in (DynamicLayer, LinearAttentionAndFullAttentionLayer)


def has_linear_state(layer: Any) -> bool:
    """Whether a linear-attention (state-space, convolution) state lies in this layer."""
    return isinstance(layer, LinearAttentionCacheLayerMixin)
