"""Column votes in plain torch, blocked over queries and keys: memory is O(S) per head, never [W, S] for all of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

QUERY_BLOCK = 128
KEY_BLOCK = 2048


def column_votes_reference(
    query: Tensor,
    key: Tensor,
    start: Tensor | None,
    heads: int,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    group: str,
    round_to: torch.dtype | None,
    lse: Tensor | None = None,
) -> Tensor:
    """See :func:`llm_accel.kernels.column_votes.column_votes`."""
    batch, query_heads, width, _ = query.shape
    slots = key.shape[2]
    per_head = torch.zeros(batch, query_heads, slots, dtype=torch.float32, device=key.device)
    for row in range(0, width, QUERY_BLOCK):
        rows = query[:, :, row : row + QUERY_BLOCK]
        seen = slots - width + row + rows.shape[2]
        visible = key[:, :, :seen]
        if lse is None:
            normaliser = row_logsumexp(rows, visible, start, scaling, softcap, sinks)
        else:
            given = lse[:, :, row : row + QUERY_BLOCK].float()
            normaliser = given.masked_fill(~given.isfinite(), float("inf"))
        for first, last, logits in _logit_blocks(rows, visible, start, scaling, softcap):
            probability = logits.sub_(normaliser[..., None]).exp_()
            if round_to is not None:
                probability = probability.to(round_to).float()
            per_head[..., first:last] += probability.sum(-2)
    grouped = per_head.view(batch, heads, query_heads // heads, slots)
    if group == "max":
        return grouped.amax(2)
    return grouped.sum(2) if group == "sum" else grouped.mean(2)


def row_logsumexp(
    rows: Tensor,
    key: Tensor,
    start: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """fp32 [B, Hq, rows]; +inf for rows that see nothing, so that their probabilities are 0."""
    blocks = _logit_blocks(rows, key, start, scaling, softcap)
    parts = [torch.logsumexp(logits, -1) for _, _, logits in blocks]
    if sinks is not None:
        parts.append(sinks.float()[None, :, None].expand(rows.shape[:3]))
    total = torch.logsumexp(torch.stack(parts), 0)
    return total.masked_fill(total == float("-inf"), float("inf"))


def _logit_blocks(
    rows: Tensor, key: Tensor, start: Tensor | None, scaling: float, softcap: float | None
) -> Iterator[tuple[int, int, Tensor]]:
    """(first slot, past-the-end slot, fp32 logits [B, Hq, rows, block]) with -inf where a query may not look; the last
    row belongs to the last slot of ``key``."""
    batch, query_heads, count, head_dim = rows.shape
    key_heads, slots = key.shape[1], key.shape[2]
    packed = rows.reshape(batch, key_heads, (query_heads // key_heads) * count, head_dim).float()
    own_slot = torch.arange(slots - count, slots, device=key.device)
    for first in range(0, slots, KEY_BLOCK):
        last = min(first + KEY_BLOCK, slots)
        logits = torch.matmul(packed, key[:, :, first:last].float().transpose(2, 3))
        logits = logits.view(batch, query_heads, count, last - first).mul_(scaling)
        logits = soft_capped(logits, softcap)
        slot = torch.arange(first, last, device=key.device)
        hidden = (slot[None] > own_slot[:, None])[None, None]
        if start is not None:
            per_head = start[:, None] if start.ndim == 1 else start.repeat_interleave(query_heads // key_heads, 1)
            hidden = hidden | (slot < per_head[..., None, None])
        yield first, last, logits.masked_fill_(hidden, float("-inf"))


def soft_capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits after a soft cap, where there is one."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap
