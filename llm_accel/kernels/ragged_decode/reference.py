"""Ragged attention in plain torch: each page gets a softmax of its own, then the pages of a head are combined. The pool
is read in place, block by block, and no head is padded to the length of another. Where a decode step finds little to
read, padding it costs less than the forty operations that this takes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_accel.kernels.column_votes.reference import soft_capped

QUERY_BLOCK = 32
POOL_BLOCK = 2**16  # entries read at once
PADDED = 2**19  # numbers in keys and values that a decode step may copy


def ragged_attention_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """See :func:`llm_accel.kernels.ragged_decode.ragged_attention`."""
    batch, query_heads, count, head_dim = query.shape
    heads, width = table.shape[1], values.shape[-1]
    precision = torch.float64 if query.dtype == torch.float64 else torch.float32
    copied = table.numel() * keys.shape[1] * (head_dim + width)
    if count == 1 and softcap is None and sinks is None and copied <= PADDED:
        return _one_step(query, keys, values, table, lengths, scaling, precision)
    packed = query.reshape(batch * heads, query_heads // heads, count, head_dim)
    owner, first = _owners(table, keys.shape[0], keys.shape[1])
    output = query.new_empty(batch, count, query_heads, width)
    for step in range(0, count, QUERY_BLOCK):
        rows = packed[:, :, step : step + QUERY_BLOCK].to(precision)
        steps = torch.arange(step, step + rows.shape[2], device=query.device)
        # entries that each query sees, [B * H, t]: all but those of the queries after it
        seen = lengths.flatten()[:, None] - count + 1 + steps
        partial = _partials(rows * scaling, keys, values, owner, first, seen, softcap)
        sink = None if sinks is None else sinks.to(precision).view(1, heads, -1, 1)
        combined = _combined(*partial, table, sink)
        output[:, step : step + rows.shape[2]] = combined.reshape(batch, query_heads, -1, width).transpose(1, 2)
    return output


def _one_step(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    scaling: float,
    precision: torch.dtype,
) -> Tensor:
    """One query per row, all heads padded to the longest and computed together."""
    batch, heads, pages = table.shape
    slots = pages * keys.shape[1]
    mask = (torch.arange(slots, device=query.device) < lengths[..., None])[:, :, None]
    key, value = (pool[table].view(batch, heads, slots, -1).to(precision) for pool in (keys, values))  # -1: any page
    rows = query.reshape(batch, heads, -1, query.shape[-1]).to(precision)
    output = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
    return output.to(query.dtype).reshape(batch, 1, query.shape[1], -1)


def _owners(table: Tensor, pages: int, size: int) -> tuple[Tensor, Tensor]:
    """Row-and-head that owns each page and the place of the page's first entry in it, int64 [N]; pages that
    belong to none start where no query attends."""
    row, head, rank = (table >= 0).nonzero(as_tuple=True)
    page = table[row, head, rank]
    owner = torch.zeros(pages, dtype=torch.long, device=table.device)
    first = torch.full_like(owner, torch.iinfo(torch.int64).max - size)
    owner[page] = row * table.shape[1] + head
    first[page] = rank * size
    return owner, first


def _partials(
    rows: Tensor, keys: Tensor, values: Tensor, owner: Tensor, first: Tensor, seen: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of scaled queries [B * H, G, t, D] within each page: largest logit [N, G * t], sum of exponentials
    [N, G * t] and weighted values [N, G * t, Dv]. A page that a query does not see has the lowest logit and sum 0."""
    pages, size, width = values.shape
    group, steps = rows.shape[1], rows.shape[2]
    largest = rows.new_empty(pages, group * steps)
    total, mixed = torch.empty_like(largest), rows.new_empty(pages, group * steps, width)
    slots = torch.arange(size, device=keys.device)
    block = max(1, POOL_BLOCK // size)
    for start in range(0, pages, block):
        part = slice(start, start + block)
        whose = owner[part]
        logits = rows[whose].flatten(1, 2) @ keys[part].to(rows.dtype).transpose(1, 2)
        logits = soft_capped(logits, softcap)
        visible = (first[part, None] + slots)[:, None, None] < seen[whose][:, None, :, None]
        logits.unflatten(1, (group, steps)).masked_fill_(~visible, float("-inf"))
        peak = logits.amax(-1).clamp(min=torch.finfo(logits.dtype).min)
        weights = logits.sub_(peak[..., None]).exp_()
        largest[part], total[part] = peak, weights.sum(-1)
        mixed[part] = weights @ values[part].to(rows.dtype)
    return largest, total, mixed


def _combined(largest: Tensor, total: Tensor, mixed: Tensor, table: Tensor, sink: Tensor | None) -> Tensor:
    """The pages of each row and head together, [B, H, G * t, Dv]; ``sink`` [1, H, G, 1] joins the softmax."""
    pages = table.clamp(min=0)
    peaks = largest[pages].masked_fill((table < 0)[..., None], torch.finfo(largest.dtype).min)
    top = peaks.amax(2)
    if sink is not None:
        steps = top.shape[-1] // sink.shape[2]
        sink = sink.expand(-1, -1, -1, steps).flatten(2)
        top = torch.maximum(top, sink)
    scale = torch.exp(peaks - top[:, :, None]).masked_fill((table < 0)[..., None], 0.0)
    whole = (scale * total[pages]).sum(2)
    if sink is not None:
        whole = whole + torch.exp(sink - top)
    return (scale[..., None] * mixed[pages]).sum(2) / whole[..., None]
