"""Slot decode in plain torch: one softmax over all slots, which are few."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_accel.kernels.column_votes.reference import soft_capped


def slot_decode_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    positions: Tensor,
    start: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    decay: float,
    keep_first: int,
    keep_recent: int,
    per_query: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`llm_accel.kernels.slot_decode.slot_decode`."""
    (batch, query_heads, _, _), (kv_heads, slots) = query.shape, key.shape[1:3]
    precision = torch.promote_types(query.dtype, torch.float32)
    rows = query.reshape(batch, kv_heads, query_heads // kv_heads, -1).to(precision)
    logits = rows @ key.to(precision).transpose(2, 3) * scaling
    logits = soft_capped(logits, softcap)
    if start is not None:
        empty = torch.arange(slots, device=key.device) < start[:, None, None, None]
        logits = logits.masked_fill(empty, float("-inf"))
    total = logits.logsumexp(-1, keepdim=True)
    if sinks is not None:
        total = torch.logaddexp(total, sinks.to(precision).view(1, kv_heads, -1, 1))
    weights = (logits - total.masked_fill(total == float("-inf"), 0.0)).exp()
    output = (weights @ value.to(precision)).view(batch, 1, query_heads, -1).to(query.dtype)
    votes = weights.view(batch, scores.shape[1], -1, slots).sum(2)
    updated = scores * decay + votes.float()
    return output, updated, lowest_slots(updated, positions, keep_first, keep_recent, per_query)


def lowest_slots(scores: Tensor, positions: Tensor, keep_first: int, keep_recent: int, per_query: bool) -> Tensor:
    """The slot with the lowest score, the oldest of equals, int64 [B, heads]. Empty slots, the first positions and the
    most recent ones are left out; where nothing else is there, an empty slot if there is one, else the oldest.

    Args:
        scores: fp32 [B, heads, P].
        positions: original position of each slot, int64 [B, heads, P]; -1 where a slot is empty.
        keep_first: positions below this one are left out.
        keep_recent: number of newest positions that are left out.
        per_query: divide scores by the number of positions from a slot's own to the newest.
    """
    newest = positions.amax(-1, keepdim=True)
    if per_query:
        scores = scores / (newest - positions + 1)
    fixed = (positions < keep_first) | (positions > newest - keep_recent)
    scores = scores.masked_fill(fixed, float("inf"))
    lowest = scores.amin(-1, keepdim=True)
    oldest = positions.masked_fill(scores > lowest, torch.iinfo(torch.int64).max)
    return oldest.argmin(-1)
