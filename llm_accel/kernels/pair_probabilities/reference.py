"""Pair probabilities in plain torch: the log-sum-exp of each row in blocks, then the chosen pairs alone."""

from __future__ import annotations

import torch
from torch import Tensor

QUERY_BLOCK = 128
KEY_BLOCK = 2048


def pair_probabilities_reference(
    query: Tensor, key: Tensor, columns: Tensor, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """See :func:`llm_accel.kernels.pair_probabilities.pair_probabilities`."""
    batch, query_heads, count, dim = query.shape
    heads, slots = key.shape[1], key.shape[2]
    result = torch.zeros(batch, query_heads, count, columns.shape[1], dtype=torch.float32, device=key.device)
    for first in range(0, count, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, count)
        own = torch.arange(slots - count + first, slots - count + last, device=key.device)
        rows = query[:, :, first:last].float().view(batch, heads, query_heads // heads, last - first, dim)
        total = _logsumexp(rows, key, own, scaling, softcap)
        if sinks is not None:
            total = torch.logaddexp(total, sinks.float().view(1, heads, -1, 1))
        wanted = columns[first:last]
        chosen = key[:, :, wanted.clamp(min=0)].float()  # [B, H, rows, m, D]
        logits = _capped(torch.einsum("bhgrd,bhrmd->bhgrm", rows, chosen) * scaling, softcap)
        seen = (wanted >= 0) & (wanted <= own[:, None])
        part = (logits - total[..., None]).exp().masked_fill(~seen, 0.0)
        result[:, :, first:last] = part.flatten(1, 2)
    return result


def _logsumexp(rows: Tensor, key: Tensor, own: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """fp32 [B, H, G, rows] over the slots up to each row's own."""
    parts = []
    seen = int(own[-1]) + 1
    for first in range(0, seen, KEY_BLOCK):
        block = key[:, :, first : min(first + KEY_BLOCK, seen)].float()
        logits = _capped(torch.einsum("bhgrd,bhsd->bhgrs", rows, block) * scaling, softcap)
        slot = torch.arange(first, first + block.shape[2], device=key.device)
        parts.append(logits.masked_fill(slot > own[:, None], float("-inf")).logsumexp(-1))
    return torch.stack(parts).logsumexp(0)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap
