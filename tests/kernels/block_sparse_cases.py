"""Random problems of block-sparse attention, and a dense masked softmax in float64 that solves them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from llm_accel.kernels.block_list import BlockList, aligned_window, block_positions
from llm_accel.kernels.block_sparse import block_sparse_attention


def blocks_from_mask(listed: Tensor, positions: Tensor, *, block_q: int, block_k: int) -> BlockList:
    """From the blocks themselves, bool [B, HL, n, blocks of keys], without sink and window segment; causality still
    holds within them. Waits for the device.

    Args:
        positions: first position of each query block, int64 [B, n].
    """
    ends = torch.arange(1, listed.shape[-1] + 1, device=listed.device) * block_k
    whole = listed & (ends <= positions[:, None, :, None] + 1)
    # the whole blocks of a list first, then the others, both ascending
    order = torch.where(whole, 0, torch.where(listed, 1, 2)).sort(dim=-1, stable=True).indices
    n_listed = listed.sum(-1)
    taken = torch.arange(listed.shape[-1], device=listed.device) < n_listed[..., None]
    ptr = (n_listed.flatten().cumsum(0) - n_listed.flatten()).view(n_listed.shape)
    begin = torch.full_like(ptr, torch.iinfo(torch.int32).max).int()
    return BlockList(block_q, block_k, ptr, whole.sum(-1).int(), n_listed.int(), order[taken].int(), 0, begin)


def mask_of(blocks: BlockList, queries: int, slots: int, start: Tensor | None = None) -> Tensor:
    """bool [B, HL, T, S]: which slots each query sees."""
    batch, heads, count = blocks.ptr.shape
    mask = torch.zeros(batch, heads, queries, slots, dtype=torch.bool, device=blocks.ptr.device)
    slot, row = torch.arange(slots, device=mask.device), torch.arange(queries, device=mask.device)
    for b in range(batch):
        first = 0 if start is None else int(start[b])
        position, own = slot - first, row + slots - queries - first
        number = (row - max(0, first - (slots - queries))) // blocks.block_q
        causal = (position >= 0) & (position <= own[:, None])
        for head in range(heads):
            for m in range(count):
                ptr, begin = int(blocks.ptr[b, head, m]), int(blocks.window_start[b, head, m])
                listed = blocks.idx[ptr : ptr + int(blocks.n_listed[b, head, m])]
                near = (position >= begin).expand(queries, -1)
                if blocks.window is not None:
                    near = near & (position > own[:, None] - blocks.window)
                seen = near | (position < blocks.sink) | torch.isin(position // blocks.block_k, listed)
                mask[b, head] |= causal & seen & (number == m)[:, None]
    return mask


@dataclass
class Case:
    """Random tensors and random lists; padding slots hold large values that must not be seen."""

    queries: int = 100
    slots: int = 100
    kv_heads: int = 2
    group: int = 2
    lists: str = "kv"
    block_q: int = 16
    block_k: int = 8
    sink: int = 16
    window: int = 20
    budget: int = 3
    kind: str = "selected"
    dim: int = 16
    width: int = 16
    start: list[int] | None = None
    softcap: float | None = None
    with_sinks: bool = False
    dtype: torch.dtype = torch.float32
    seed: int = 0
    query: Tensor = field(init=False)
    blocks: BlockList = field(init=False)

    def __post_init__(self) -> None:
        self.random = torch.Generator().manual_seed(self.seed)
        batch = 2 if self.start is None else len(self.start)
        heads = self.kv_heads * self.group
        self.query = self._randn(batch, heads, self.queries, self.dim)
        self.key = self._randn(batch, self.kv_heads, self.slots, self.dim)
        self.value = self._randn(batch, self.kv_heads, self.slots, self.width)
        self.first = None if self.start is None else torch.tensor(self.start)
        for row, first in enumerate(self.start or []):
            self.key[row, :, :first], self.value[row, :, :first] = 1e4, 1e4
        self.sinks = self._randn(heads) if self.with_sinks else None
        positions = block_positions(self.queries, self.slots, self.block_q, self.first, torch.device("cpu"))
        positions = positions.expand(batch, -1)
        list_heads = {"one": 1, "kv": self.kv_heads, "query": heads}[self.lists]
        self.blocks = getattr(self, f"_{self.kind}")(positions, list_heads)

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random).to(self.dtype)

    def _selected(self, positions: Tensor, lists: int) -> BlockList:
        """Up to ``budget`` random blocks between sink and window, with nonsense after the last of them."""
        window = aligned_window(positions, window=self.window, sink=self.sink, block_k=self.block_k)[:, None]
        shape = (positions.shape[0], lists, positions.shape[1], -(-self.slots // self.block_k))
        order = torch.rand(shape, generator=self.random)
        starts = torch.arange(shape[-1]).expand(shape) * self.block_k
        order = order.masked_fill((starts < self.sink) | (starts >= window[..., None]), 2.0)
        picked = order.argsort(-1)[..., : self.budget] * self.block_k
        alive = order.gather(-1, picked // self.block_k) < 2
        picked = picked.masked_fill(~alive, 10**6).sort(-1).values
        return BlockList.from_selected(
            picked, alive.sum(-1), block_q=self.block_q, block_k=self.block_k, sink=self.sink, window_start=window
        )

    def _everything(self, positions: Tensor, lists: int) -> BlockList:
        self.budget = self.slots
        return self._selected(positions, lists)

    def _sink_window(self, positions: Tensor, lists: int) -> BlockList:
        return BlockList.sink_window(
            positions, block_q=self.block_q, block_k=self.block_k, sink=self.sink, window=self.window
        )

    def _dense_mask(self, positions: Tensor, lists: int) -> BlockList:
        shape = (positions.shape[0], lists, positions.shape[1], -(-self.slots // self.block_k))
        listed = torch.rand(shape, generator=self.random) < 0.4
        return blocks_from_mask(listed, positions, block_q=self.block_q, block_k=self.block_k)

    def _dense(self, positions: Tensor, lists: int) -> BlockList:
        blocks = self._sink_window(positions, lists)
        return replace(blocks, window=None, window_start=torch.zeros_like(blocks.window_start))

    def ours(self, blocks: BlockList | None = None) -> tuple[Tensor, Tensor]:
        return block_sparse_attention(
            self.query,
            self.key,
            self.value,
            self.blocks if blocks is None else blocks,
            scaling=0.3,
            start=self.first,
            softcap=self.softcap,
            sinks=self.sinks,
        )

    def mask(self) -> Tensor:
        """bool [B, Hq, T, S]."""
        mask = mask_of(self.blocks, self.queries, self.slots, self.first)
        return mask.repeat_interleave(self.query.shape[1] // mask.shape[1], 1)

    def oracle(self) -> tuple[Tensor, Tensor]:
        mask = self.mask()
        query, key, value = self.query.double(), self.key.double(), self.value.double()
        logits = query @ key.repeat_interleave(self.group, 1).transpose(2, 3) * 0.3
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        logits = logits.masked_fill(~mask, float("-inf"))
        lse = logits.logsumexp(-1)
        if self.sinks is not None:
            lse = torch.logaddexp(lse, self.sinks.double()[:, None])
        lse = lse.masked_fill(~mask.any(-1), float("-inf"))
        weights = torch.exp(logits - lse[..., None]).masked_fill(~mask, 0.0)
        return (weights @ value.repeat_interleave(self.group, 1)).transpose(1, 2), lse


CASES = {
    "selected": Case(),
    "one_list": Case(lists="one"),
    "list_per_query_head": Case(lists="query"),
    "one_query_head_per_kv_head": Case(group=1),
    "odd_group": Case(group=3, kv_heads=1),
    "odd_lengths": Case(queries=111, slots=111, block_k=16, block_q=32),
    "chunk": Case(queries=37, slots=143),
    "one_query": Case(queries=1, slots=143),
    "shorter_than_sink": Case(queries=9, slots=9),
    "shorter_than_window": Case(queries=30, slots=30),
    "no_sink": Case(sink=0),
    "window_of_one": Case(window=1),
    "nothing_selected": Case(budget=0),
    "padded": Case(start=[0, 37, 99, 100]),
    "padded_chunk": Case(queries=37, slots=143, start=[0, 50, 106, 130]),
    "padded_list_per_query_head": Case(lists="query", start=[13, 50]),
    "softcap": Case(softcap=1.5),
    "learned_sinks": Case(with_sinks=True, start=[3, 100]),
    "wide_values": Case(width=24),
    "narrow_values": Case(width=8),
    "streaming": Case(kind="sink_window"),
    "streaming_odd": Case(kind="sink_window", sink=5, window=13, queries=111, slots=111),
    "streaming_padded": Case(kind="sink_window", sink=5, window=13, start=[7, 61, 98]),
    "streaming_chunk": Case(kind="sink_window", sink=3, window=30, queries=50, slots=91, start=[0, 45]),
    "streaming_no_sink": Case(kind="sink_window", sink=0, window=11),
    "dense": Case(kind="dense", start=[0, 33]),
    "any_blocks": Case(kind="dense_mask"),
    "any_blocks_padded": Case(kind="dense_mask", start=[0, 21], block_k=16),
    "large_blocks": Case(queries=300, slots=300, block_q=128, block_k=64, sink=64, window=70),
}
