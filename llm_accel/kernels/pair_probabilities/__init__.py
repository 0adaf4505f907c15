"""Pair probabilities: how much attention each query pays to a few chosen keys."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_accel.kernels.column_votes.reference import QUERY_BLOCK, row_logsumexp, soft_capped
from llm_accel.kernels.dispatch import Op, Problem, torch_backend


def pair_probabilities(
    query: Tensor,
    key: Tensor,
    columns: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention probabilities at chosen (query, key) pairs.

    Args:
        query: [B, Hq, n, D], post-RoPE; row ``i`` belongs to slot ``S - n + i`` and sees slots up to its own.
        key: [B, H, S, D], post-RoPE; query head ``h`` attends to key head ``h // (Hq // H)``.
        columns: slots asked for, int64 [n, m]; -1 where a row asks for fewer.
        scaling: softmax scale.
        softcap: logit soft cap, applied before the softmax.
        sinks: learned sink logits [Hq] that take part in the softmax.

    Returns:
        fp32 [B, Hq, n, m]; 0 for -1 and for slots that a row does not see. O(n m + S) memory, never n x S.
    """
    run = OP.choose(Problem.of(query, key)).run
    return run(query, key, columns, scaling, softcap, sinks)  # type: ignore[no-any-return]


def _reference(
    query: Tensor, key: Tensor, columns: Tensor, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """The log-sum-exp of each row in blocks, then the chosen pairs alone."""
    own = torch.arange(key.shape[2] - query.shape[2], key.shape[2], device=key.device)
    parts = []
    for first in range(0, len(own), QUERY_BLOCK):
        here = slice(first, first + QUERY_BLOCK)
        rows, wanted, last = query[:, :, here], columns[here], own[here]
        total = row_logsumexp(rows, key[:, :, : int(last[-1]) + 1], None, scaling, softcap, sinks)  # [B, Hq, rows]
        grouped = rows.float().unflatten(1, (key.shape[1], -1))  # [B, H, G, rows, D]
        chosen = key[:, :, wanted.clamp(min=0)].float()  # [B, H, rows, m, D]
        logits = soft_capped(torch.einsum("bhgrd,bhrmd->bhgrm", grouped, chosen) * scaling, softcap)
        seen = (wanted >= 0) & (wanted <= last[:, None])
        parts.append((logits.flatten(1, 2) - total[..., None]).exp().masked_fill(~seen, 0.0))
    return torch.cat(parts, dim=2)


OP = Op("pair_probabilities", torch_backend(_reference, "blocked over queries and keys"))
