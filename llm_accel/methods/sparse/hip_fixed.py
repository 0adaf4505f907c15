"""HiP's decode memory in tensors of fixed size, for steps that are one graph."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_accel.kernels import ragged_decode
from llm_accel.kernels.hip_select import ABSENT, Keys, Search, StageSearch, paged
from llm_accel.methods.attention import Memory
from llm_accel.methods.sparse.hip_decode import DecodeMemory, choose, due_stage


class FixedMemory:
    """A :class:`DecodeMemory` over buffers whose rows fill their first slots. A step has one of a few patterns, each a
    graph: dense attention, the latest choice again, or a choice from one of the stages on.

    Attributes:
        sparse_steps: steps since :meth:`take` that attended to chosen blocks.

    Args:
        search: how blocks are found.
        refresh: steps between two choices of each stage.
        limit: slots up to which attention is dense.
        rows, heads, device: of the buffers.
    """

    def __init__(
        self, search: Search, refresh: tuple[int, ...], limit: int, rows: int, heads: int, device: torch.device
    ) -> None:
        self._search, self._refresh, self._limit = search, refresh, limit
        self._kept = [torch.full((rows, heads, 1, width), ABSENT, device=device) for width in _widths(search)]
        self._seen = [torch.zeros(rows, dtype=torch.long, device=device) for _ in self._kept]
        self._pattern: tuple[bool, int | None] = (False, None)
        self._memory = DecodeMemory(0)
        self.sparse_steps = 0

    def tensors(self) -> list[Tensor]:
        """What a graph reads and writes."""
        return [*self._kept, *self._seen]

    def take(self, memory: Memory | None, slots: int, start: Tensor | None) -> None:
        """Begins where eager decoding stopped, with ``slots`` stored."""
        self._memory = DecodeMemory(slots, step=-1)
        if isinstance(memory, DecodeMemory) and memory.slots == slots:
            self._memory = memory
        for mine, theirs in zip(self._kept, self._memory.kept, strict=False):
            mine.copy_(_padded(theirs, mine))
        for tensor, seen in zip(self._seen, self._memory.seen, strict=False):
            tensor.fill_(seen)
            if start is not None:
                tensor.sub_(start)
        self.sparse_steps = 0

    def give(self) -> Memory:
        """The memory for eager decoding to go on with."""
        memory = self._memory
        kept = tuple(tensor.clone() for tensor in self._kept) if memory.seen else ()
        return DecodeMemory(memory.slots, memory.step, kept, memory.seen)

    def begin(self) -> Hashable:
        """The pattern of the next step."""
        memory = self._memory
        dense = memory.slots + 1 <= self._limit
        self._pattern = due_stage(self._refresh, memory.step + 1, dense, bool(memory.seen))
        return self._pattern

    def advance(self) -> None:
        """Counts the step that :meth:`begin` announced."""
        sparse, due = self._pattern
        slots, seen = self._memory.slots + 1, self._memory.seen if sparse else ()
        if due is not None:
            seen = (*seen[:due], *[slots] * (len(self._kept) - due))
        self._memory = DecodeMemory(slots, self._memory.step + 1, (), seen)
        self.sparse_steps += sparse

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, *, scaling: float, **softmax: Any
    ) -> Tensor | None:
        """[B, 1, Hq, Dv] over what one new query per row sees of the first ``lengths`` slots, int64 [B], its own the
        last of them; None for all of them."""
        sparse, due = self._pattern
        if not sparse:
            return None
        search, scope, capacity = replace(self._search, scaling=scaling), self._search.scope, keys.shape[2]
        if due is not None:
            then, moved = (scope.end_at(self._seen[due - 1] - 1), self._refresh[due - 1]) if due else (None, 0)
            most, end = scope.most(1, capacity, 0), scope.end_at(lengths - 1)
            found = choose(search, query, Keys.first(keys, lengths), end, most, due, self._kept, then, moved)
            for kept, seen, chunks in zip(self._kept[due:], self._seen[due:], found, strict=True):
                kept.copy_(_padded(chunks, kept))
                seen.copy_(lengths)
        begin = scope.end_at(self._seen[-1] - 1).flatten()
        recent = scope.window + scope.block_k + self._refresh[-1]
        table, entries = paged(self._kept[-1][:, :, 0], scope, begin, lengths, capacity, recent)
        key_pages, value_pages = (pool.reshape(-1, scope.block_k, pool.shape[-1]) for pool in (keys, values))
        return ragged_decode.ragged_attention(query, key_pages, value_pages, table, entries, scaling=scaling, **softmax)


def _widths(search: Search) -> list[int]:
    """Chunks that each stage keeps at most."""
    if isinstance(search, StageSearch):
        return [search.kept(stage) for stage in range(len(search.stages))]
    return [search.budget // search.scope.block_k]


def _padded(chunks: Tensor, like: Tensor) -> Tensor:
    """Chunks [B, H, 1, n], absent ones added."""
    return F.pad(chunks, (0, like.shape[-1] - chunks.shape[-1]), value=ABSENT)
