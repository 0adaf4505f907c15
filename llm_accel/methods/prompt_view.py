"""What a method sees of a layer whose prompt is complete."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llm_accel.methods.shard import WHOLE, HeadShard


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
class PromptView:
    """What a method sees of one layer once the prompt is complete. Slots are right-aligned: row ``b`` holds real
    entries in ``[start[b], S)``, oldest first; everything left of ``start[b]`` is padding.

    Attributes:
        query: the last observed queries, post-RoPE, [B, Hq, W, D]; row ``i`` belongs to slot ``S - W + i``.
        key: all keys as attention sees them, post-RoPE, [B, H, S, D]; H is Hk, or Hq where the model expands latents.
        kv_heads: heads that the cache stores and that decide on their own (1 for latent caches).
        start: first real slot of each row, int64 [B]; None when no row is padded. [B, kv_heads] where earlier
            evictions left the heads of a row with different numbers of entries.
        scaling: softmax scale.
        softcap: logit soft cap, or None.
        sinks: learned sink logits per query head [Hq], or None.
        layer: index of the layer.
        layers: number of layers of the model.
        protected: slots that must stay, bool [B, S], or None.
        scores: attention that each entry has received so far, fp32 [B, kv_heads, S], for methods that ask for it.
        depth: where the layer stands among those that the method acts on.
        slack: entries above its budget from which on a row is cut; rows with fewer keep all they have.
        seen: tokens that each row has seen, int64 [B or 1]; None where none of them was evicted before.
        entries: entries that each row may keep, int64 [B], where the prompt has fixed that; None: the method's own.
        heads: what the heads here say to those in other processes, and hear from them.
    """

    query: Tensor
    key: Tensor
    kv_heads: int
    start: Tensor | None
    scaling: float
    softcap: float | None
    sinks: Tensor | None
    layer: int
    layers: int
    protected: Tensor | None = None
    scores: Tensor | None = None
    depth: Depth = Depth()
    slack: int = 1
    seen: Tensor | None = None
    entries: Tensor | None = None
    heads: HeadShard = WHOLE

    @property
    def slots(self) -> int:
        """Stored slots S, padding included."""
        return self.key.shape[2]

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
