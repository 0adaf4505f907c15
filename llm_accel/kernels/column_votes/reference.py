"""Column votes in plain torch, blocked over keys so that no [W, S] fp32 tensor of all heads is ever held."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

KEY_BLOCK = 4096


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
) -> Tensor:
    """See :func:`llm_accel.kernels.column_votes.column_votes`."""
    batch, query_heads, width, _ = query.shape
    slots = key.shape[2]
    normaliser = _row_logsumexp(query, key, start, scaling, softcap, sinks)
    votes = torch.empty(batch, heads, slots, dtype=torch.float32, device=key.device)
    for first, last, logits in _logit_blocks(query, key, start, scaling, softcap):
        probability = torch.exp(logits - normaliser[..., None])
        if round_to is not None:
            probability = probability.to(round_to).float()
        per_head = probability.sum(-2).view(batch, heads, query_heads // heads, last - first)
        votes[..., first:last] = per_head.amax(2) if group == "max" else per_head.mean(2)
    return votes


def _row_logsumexp(
    query: Tensor, key: Tensor, start: Tensor | None, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """fp32 [B, Hq, W]; +inf for rows that see nothing, so that their probabilities are 0."""
    parts = [torch.logsumexp(logits, -1) for _, _, logits in _logit_blocks(query, key, start, scaling, softcap)]
    if sinks is not None:
        parts.append(sinks.float()[None, :, None].expand(query.shape[:3]))
    total = torch.logsumexp(torch.stack(parts), 0)
    return total.masked_fill(total == float("-inf"), float("inf"))


def _logit_blocks(
    query: Tensor, key: Tensor, start: Tensor | None, scaling: float, softcap: float | None
) -> Iterator[tuple[int, int, Tensor]]:
    """(first slot, past-the-end slot, fp32 logits [B, Hq, W, block]) with -inf where a query may not look."""
    batch, query_heads, width, head_dim = query.shape
    key_heads, slots = key.shape[1], key.shape[2]
    packed = query.reshape(batch, key_heads, (query_heads // key_heads) * width, head_dim)
    own_slot = torch.arange(slots - width, slots, device=key.device)
    for first in range(0, slots, KEY_BLOCK):
        last = min(first + KEY_BLOCK, slots)
        logits = torch.matmul(packed.float(), key[:, :, first:last].float().transpose(2, 3))
        logits = logits.view(batch, query_heads, width, last - first).mul_(scaling)
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        slot = torch.arange(first, last, device=key.device)
        hidden = (slot[None] > own_slot[:, None])[None]
        if start is not None:
            hidden = hidden | (slot[None] < start[:, None])[:, None]
        yield first, last, logits.masked_fill_(hidden[:, None], float("-inf"))
