"""The heads of a layer that this process holds under tensor parallelism, and exchange with the other processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class HeadShard:
    """Process ``rank`` of ``count`` holds the ``rank``-th of ``count`` equal runs of heads, of queries and keys alike.

    Whatever a method decides about the heads of a layer together must go through here: each process sees its own heads
    only, and processes that decide differently diverge or deadlock. All processes must make
    the same calls in the same order. With one process everything is returned as it is given.

    Attributes:
        rank: place of this process, from 0.
        count: processes that share the heads; 1 where all heads are here.
        group: the process group of torch, or None.
        query_heads: query heads here, of each layer, where there are several processes; 0: not counted.
    """

    rank: int = 0
    count: int = 1
    group: Any = None
    query_heads: int = 0

    def own(self, heads: Sequence[int], total: int) -> tuple[int, ...]:
        """Those of the given heads that are here; given of all ``total`` of the layer, returned of those here."""
        size = total // self.count
        first = self.rank * size
        return tuple(head - first for head in heads if first <= head < first + size)

    def numbers(self, held: int, device: torch.device) -> Tensor:
        """The ``held`` heads that are here, counted over the whole layer: int64 [held]."""
        return torch.arange(held, device=device) + self.rank * held

    def every(self, own: Tensor) -> Tensor:
        """Gathers all heads: [B, h, ...] of the heads here -> [B, count * h, ...], the same in every process."""
        if self.count == 1:
            return own
        parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(self.count)]
        dist.all_gather(parts, own.contiguous(), group=self.group)
        return torch.cat(parts, dim=1)

    def mine(self, every: Tensor) -> Tensor:
        """The part of :meth:`every` that belongs to the heads here: [B, H, ...] -> [B, H / count, ...]."""
        return every.chunk(self.count, dim=1)[self.rank]

    def sum(self, own: Tensor) -> Tensor:
        """Sum over the processes, of any shape."""
        return self._reduced(own, "SUM")

    def mean(self, own: Tensor) -> Tensor:
        """Mean over the processes, of any shape: of means over the heads here it is the mean over all heads."""
        return self.sum(own) / self.count if self.count > 1 else own

    def max(self, own: Tensor) -> Tensor:
        """Maximum over the processes, of any shape."""
        return self._reduced(own, "MAX")

    def _reduced(self, own: Tensor, operation: str) -> Tensor:
        if self.count == 1:
            return own
        reduced = own.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(reduced, getattr(dist.ReduceOp, operation), group=self.group)
        return reduced


WHOLE = HeadShard()
