"""Block-sparse attention in plain torch: one softmax per query block and list, over the gathered keys that the list
names. Masks are applied only to keys that some query of the block must not see."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_accel.kernels.block_list import BlockList

LOGITS = 2**18  # of as many KV heads at once as the cache of a processor holds
# Logits below the largest by more weigh as if by this much, 1e-38 of it: a processor takes a hundred times as long for
# an exponential that is too small for a normal number, as most are where attention is sharp.
FAINTEST = -87.0


def block_sparse_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: BlockList,
    start: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`llm_accel.kernels.block_sparse.block_sparse_attention`; output and log-sum-exp."""
    batch, query_heads, count, _ = query.shape
    kv_heads = key.shape[1]
    precision = torch.promote_types(query.dtype, torch.float32)
    output = query.new_zeros(batch, count, query_heads, value.shape[-1])
    lse = torch.full((batch, query_heads, count), float("-inf"), dtype=precision, device=query.device)
    shared = max(1, kv_heads // blocks.heads)  # KV heads of a list
    group = query_heads // blocks.heads // shared  # query heads per KV head of a list
    for tile in _tiles(blocks, count, key.shape[2], start):
        first = tile.head * kv_heads // blocks.heads
        step = max(1, LOGITS // (group * (tile.end - tile.begin) * len(tile.slots)))
        for unit in range(0, shared, step):
            units = min(step, shared - unit)
            heads = slice((tile.head * shared + unit) * group, (tile.head * shared + unit + units) * group)
            rows = query[tile.row, heads, tile.begin : tile.end].to(precision) * scaling
            keys, values = (
                part[tile.row, first + unit : first + unit + units].index_select(1, tile.slots).to(precision)
                for part in (key, value)
            )
            sink = None if sinks is None else sinks[heads, None].to(precision)
            mixed, total = _attend(rows, keys, values, tile.hidden, softcap, sink)
            output[tile.row, tile.begin : tile.end, heads] = mixed.transpose(0, 1)
            lse[tile.row, heads, tile.begin : tile.end] = total
    return output, lse


def _attend(
    rows: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, softcap: float | None, sink: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scaled queries [u * G, t, D] over gathered keys [u, n, D] and values [u, n, Dv], the last keys but for
    ``hidden``, bool [t, m]; output [u * G, t, Dv] and log-sum-exp [u * G, t]. ``sink``: [u * G, 1]."""
    heads, count, dim = rows.shape
    logits = rows.reshape(keys.shape[0], -1, dim) @ keys.transpose(1, 2)
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    per_head = logits.view(heads, count, -1)
    edge = per_head[..., logits.shape[-1] - hidden.shape[-1] :].masked_fill_(hidden, float("-inf"))
    largest = per_head.amax(-1)
    peak = largest.clamp(min=torch.finfo(logits.dtype).min)
    if sink is not None:
        peak = torch.maximum(peak, sink)
    per_head.sub_(peak[..., None]).clamp_(min=FAINTEST).exp_()
    edge.masked_fill_(hidden, 0.0)
    total = per_head.sum(-1)
    if sink is not None:
        total += torch.exp(sink - peak)
    total.clamp_(min=1.0)  # less only where nothing is seen
    mixed = (logits @ values).view(heads, count, -1).div_(total[..., None])
    return mixed, torch.where(largest == float("-inf"), largest, total.log_().add_(peak))


@dataclass
class _Tile:
    """Queries ``begin`` to ``end`` of a row, which share list ``head``; ``slots`` int64 [n] that some of them see, of
    which the last m are ``hidden``, bool [t, m], from others."""

    row: int
    head: int
    begin: int
    end: int
    slots: Tensor
    hidden: Tensor


def _tiles(blocks: BlockList, count: int, slots: int, start: Tensor | None) -> Iterator[_Tile]:
    """Every query block with every list that names something for it."""
    every = torch.arange(slots, device=blocks.idx.device)
    corner = every.new_ones(blocks.block_q, blocks.block_q, dtype=torch.bool).triu_()
    fields = (blocks.ptr, blocks.n_full, blocks.n_listed, blocks.window_start)
    ptr, n_full, n_listed, window_start = torch.stack([field.long() for field in fields]).tolist()
    origins = [0] * blocks.ptr.shape[0] if start is None else start.tolist()  # slot of position 0
    for row, origin in enumerate(origins):
        inside = torch.arange(origin, origin + blocks.block_k, device=every.device)
        for block, begin in enumerate(range(max(0, origin - (slots - count)), count, blocks.block_q)):
            end = min(begin + blocks.block_q, count)
            first, past = begin + slots - count, end + slots - count  # own slots of the queries
            for head in range(blocks.heads):
                near = min(window_start[row][head][block] + origin, past)
                sink = min(blocks.sink + origin, near)
                # the last query sees the window segment from here on; all see it up to the slot of the first one
                left = near if blocks.window is None else max(near, past - blocks.window)
                right = max(left, first + 1)
                place, whole = ptr[row][head][block], n_full[row][head][block]
                listed = blocks.idx[place : place + n_listed[row][head][block], None] * blocks.block_k + inside
                cut = listed[whole:].flatten()
                seen = [every[origin : min(sink, first + 1)], listed[:whole].flatten(), every[left:right]]
                edge = every[right:past]
                if max(sink, right) > first + 1 or len(cut) or left > near:
                    edge = torch.cat([every[first + 1 : sink], cut[cut < past], every[near:left], edge])
                    own = every[first:past, None]
                    hidden = edge > own
                    if blocks.window is not None:
                        hidden |= (edge >= near) & (edge <= own - blocks.window)
                else:  # the slots after the first query's own alone
                    hidden = corner[: end - begin, : len(edge)]
                visible = torch.cat([*seen, edge])
                if len(visible):
                    yield _Tile(row, head, begin, end, visible, hidden)
