"""Where keys and values of one layer lie in vLLM's pages: reading a request's entries, and writing fewer back.

``kv_cache`` is [pages, KV heads, block, 2 * D], D channels per head, in all backends; how a page is filled differs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Pages(ABC):
    """One layout of pages."""

    @abstractmethod
    def read(self, kv_cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the entries in ``blocks``, int64 [n], in their order: each [KV heads, n * block, D]."""

    @abstractmethod
    def write(self, kv_cache: Tensor, blocks: Tensor, keys: Tensor, values: Tensor) -> None:
        """Fills ``blocks`` with such keys and values."""


class SplitPages(Pages):
    """FlashAttention and Triton: an entry's key and value lie side by side."""

    def read(self, kv_cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = kv_cache[blocks].transpose(0, 1).flatten(1, 2).chunk(2, dim=-1)
        return keys, values

    def write(self, kv_cache: Tensor, blocks: Tensor, keys: Tensor, values: Tensor) -> None:
        entries = torch.cat([keys, values], dim=-1).unflatten(1, (len(blocks), -1))
        kv_cache[blocks] = entries.transpose(0, 1)


class VecPages(Pages):
    """The CPU's "vec" kernels: the first half of a page is its keys as [D, block], the second its values as
    [block, D]."""

    def read(self, kv_cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = _halves(kv_cache)
        keys = keys[blocks].permute(1, 0, 3, 2).flatten(1, 2)
        return keys, values[blocks].transpose(0, 1).flatten(1, 2)

    def write(self, kv_cache: Tensor, blocks: Tensor, keys: Tensor, values: Tensor) -> None:
        stored_keys, stored_values = _halves(kv_cache)
        stored_keys[blocks] = keys.unflatten(1, (len(blocks), -1)).permute(1, 0, 3, 2)
        stored_values[blocks] = values.unflatten(1, (len(blocks), -1)).transpose(0, 1)


def _halves(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Views of the pages: keys [pages, KV heads, D, block] and values [pages, KV heads, block, D]."""
    pages, heads, block, width = kv_cache.shape
    flat = kv_cache.view(pages, heads, 2, block * width // 2)
    return flat[:, :, 0].unflatten(-1, (width // 2, block)), flat[:, :, 1].unflatten(-1, (block, width // 2))
