"""Block-sparse attention in plain torch, one query block and one list after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_accel.kernels.block_list import BlockList


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
    slots, lists = key.shape[2], blocks.heads
    precision = torch.float64 if query.dtype == torch.float64 else torch.float32
    output = query.new_zeros(batch, count, query_heads, value.shape[-1])
    lse = torch.full((batch, query_heads, count), float("-inf"), dtype=precision, device=query.device)
    per_list = query_heads // lists
    shared = max(1, key.shape[1] // lists)  # KV heads of a list
    for row in range(batch):
        first_slot = 0 if start is None else int(start[row])
        first_query = max(0, first_slot - (slots - count))
        for block, begin in enumerate(range(first_query, count, blocks.block_q)):
            own = torch.arange(begin, min(begin + blocks.block_q, count), device=query.device) + slots - count
            for head in range(lists):
                position = _candidates(blocks, row, head, block, int(own[-1]) + 1 - first_slot, query.device)
                visible = position <= (own - first_slot)[:, None]
                if blocks.window is not None:
                    far = position <= (own - first_slot)[:, None] - blocks.window
                    visible &= ~(far & (position >= blocks.window_start[row, head, block]))
                heads = slice(head * per_list, (head + 1) * per_list)
                kv_heads = slice(head * key.shape[1] // lists, head * key.shape[1] // lists + shared)
                rows = query[row, heads, begin : begin + len(own)].to(precision).unflatten(0, (shared, -1))
                keys, values = (part[row, kv_heads, position + first_slot].to(precision) for part in (key, value))
                logits = torch.einsum("hgtd,hsd->hgts", rows, keys) * scaling
                if softcap is not None:
                    logits = torch.tanh(logits / softcap) * softcap
                logits = logits.masked_fill(~visible, float("-inf")).flatten(0, 1)
                total = logits.logsumexp(-1)
                if sinks is not None:  # rows that see nothing stay at -inf
                    total = torch.where(total.isinf(), total, torch.logaddexp(total, sinks[heads, None].to(precision)))
                weights = (logits - total.masked_fill(total.isinf(), 0.0)[..., None]).exp()
                mixed = torch.einsum("hgts,hsd->thgd", weights.unflatten(0, (shared, -1)), values)
                output[row, begin : begin + len(own), heads] = mixed.flatten(1, 2).to(query.dtype)
                lse[row, heads, begin : begin + len(own)] = total
    return output, lse


def _candidates(blocks: BlockList, row: int, head: int, block: int, end: int, device: torch.device) -> Tensor:
    """Positions below ``end`` that some query of the block may see, each once."""
    begin = int(blocks.window_start[row, head, block])
    ptr = int(blocks.ptr[row, head, block])
    listed = blocks.idx[ptr : ptr + int(blocks.n_listed[row, head, block])].long()
    tokens = (listed[:, None] * blocks.block_k + torch.arange(blocks.block_k, device=device)).flatten()
    sink = torch.arange(min(blocks.sink, begin, end), device=device)
    near = torch.arange(min(begin, end), end, device=device)
    return torch.cat([sink, tokens[tokens < end], near])
