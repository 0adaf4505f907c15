"""Pair probabilities: how much attention each query pays to a few chosen keys."""

from __future__ import annotations

from torch import Tensor

from llm_accel.kernels.dispatch import Op, Problem, torch_backend
from llm_accel.kernels.pair_probabilities.reference import pair_probabilities_reference

OP = Op("pair_probabilities", torch_backend(pair_probabilities_reference, "blocked over queries and keys"))


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
