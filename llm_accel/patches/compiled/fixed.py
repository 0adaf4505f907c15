"""What all fixed-size layers share, and attention over their buffers."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from llm_accel.cache import AccelLayer, RaggedLayer
from llm_accel.cache.attention import Attention

GRANULE = 64  # capacities are multiples of it


@dataclass(frozen=True)
class Shape:
    """What decides which graph a layer belongs to.

    Attributes:
        rows, heads, capacity: of the buffers [B, Hk, C, D].
        key_width, value_width: channels D and Dv.
        dtype, device: of keys and values.
    """

    rows: int
    heads: int
    capacity: int
    key_width: int
    value_width: int
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(layer: AccelLayer, capacity: int) -> Shape:
        """Buffers for the entries of a layer."""
        rows, heads = layer.keys.shape[:2]
        if isinstance(layer, RaggedLayer) and layer.table is not None:
            rows, heads = layer.table.shape[:2]
        widths = (layer.keys.shape[-1], layer.values.shape[-1])
        return Shape(rows, heads, capacity, *widths, layer.keys.dtype, layer.keys.device)

    def buffers(self) -> tuple[Tensor, Tensor]:
        """Keys and values, zeros: nothing that is hidden may be infinite."""
        place: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        size = (self.rows, self.heads, self.capacity)
        return torch.zeros(*size, self.key_width, **place), torch.zeros(*size, self.value_width, **place)


class FixedLayer(CacheLayerMixin):
    """Entries of one layer in buffers whose size, address and Python values never change, so that one graph serves
    every step. What changes lives in tensors. ``take`` and ``give`` move the entries in and out, outside of the graph.

    Attributes:
        taken: names of the layer's attributes that live here meanwhile.
    """

    is_sliding = False
    is_compileable = False  # transformers would build masks for it, and ours would take them for unusual ones
    keys: Tensor
    values: Tensor
    taken: ClassVar[tuple[str, ...]] = ("keys", "values")

    def take(self, layer: AccelLayer) -> None:
        """Copies the entries of a layer."""
        raise NotImplementedError

    def give(self, layer: AccelLayer, steps: int) -> None:
        """Writes the entries back, in storage of their own, after ``steps`` decoded tokens."""
        raise NotImplementedError

    def begin(self) -> Hashable:
        """What is constant in the next step and may not be so in every step; each value of it is a graph of its own."""
        return None

    def advance(self) -> None:
        """The step that :meth:`begin` announced has been done."""

    def attend(self, attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of one new query per row over what :meth:`update` returned, and the eviction after it,
        [B, 1, Hq, Dv]."""
        raise NotImplementedError

    def tensors(self) -> list[Tensor]:
        """All buffers."""
        return [content for content in vars(self).values() if isinstance(content, Tensor)]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the buffers are there."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(0, 0): the sentinel that makes our mask function return None."""
        return 0, 0

    def get_seq_length(self) -> int:
        """Asked of the cache alone, which knows it."""
        raise NotImplementedError

    def get_max_length(self) -> int:
        """No maximum that concerns transformers."""
        return -1

    get_max_cache_shape = get_max_length  # its name in earlier releases


def round_up(count: int, granule: int = GRANULE) -> int:
    """The next multiple of the granule."""
    return -(-count // granule) * granule


def bucket(count: int) -> int:
    """A size of at least ``count``, one of eight between two powers of two, so that different prompts share graphs."""
    step = max(GRANULE, 1 << max(0, count.bit_length() - 4))
    return -(-count // step) * step
