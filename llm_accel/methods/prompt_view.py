"""What a method sees of a layer whose prompt is complete."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from llm_accel.methods.layer_view import LayerView


@dataclass(frozen=True)
class Depth:
    """Where a layer stands among those that a method acts on.

    Attributes:
        index: its place among them, 0 for the first.
        layers: how many there are; layers without a full cache and skipped ones do not count.
        later: whether the layer has evicted before, so that its entries are fewer than the tokens it has seen.
    """

    index: int = 0
    layers: int = 1
    later: bool = False


@dataclass(frozen=True)
class PromptView(LayerView):
    """What a method sees of one layer once the prompt is complete; ``query`` holds the queries that it asked for.

    Attributes:
        kv_heads: heads that the cache stores and that decide on their own (1 for latent caches). ``start`` is
            [B, kv_heads] where earlier evictions left the heads of a row with different numbers of entries.
        layer: index of the layer.
        layers: number of layers of the model.
        protected: slots that must stay, bool [B, S], or None.
        scores: attention that each entry has received so far, fp32 [B, kv_heads, S], for methods that ask for it.
        depth: where the layer stands among those that the method acts on.
        slack: entries above its budget from which on a row is cut; rows with fewer keep all they have.
        seen: tokens that each row has seen, int64 [B or 1]; None where none of them was evicted before.
        entries: entries that each row may keep, int64 [B], where the prompt has fixed that; None: the method's own.
    """

    kv_heads: int
    layer: int = field(kw_only=True)
    layers: int = field(kw_only=True)
    protected: Tensor | None = None
    scores: Tensor | None = None
    depth: Depth = Depth()
    slack: int = 1
    seen: Tensor | None = None
    entries: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """Real entries of each row, int64 [B]; [B, kv_heads] where heads differ."""
        if self.start is None:
            return torch.full(self.key.shape[:1], self.slots, device=self.key.device)
        return self.slots - self.start

    @property
    def cache_positions(self) -> Tensor:
        """Position of each slot in the cache, counted from the first real entry of its row: int64 [B or 1, S], below 0
        for padding; [B, kv_heads, S] where heads differ. It is that in the prompt until something is evicted."""
        index = torch.arange(self.slots, device=self.key.device)
        return index[None] if self.start is None else index - self.start[..., None]

    @property
    def valid(self) -> Tensor:
        """bool [B or 1, S]: True for real entries, False for padding; [B, kv_heads, S] where heads differ."""
        return self.cache_positions >= 0

    def newest(self, count: int) -> Tensor:
        """bool [1, S]: True for the last ``count`` entries, whatever the row."""
        return torch.arange(self.slots, device=self.key.device)[None] >= self.slots - count
