"""Column votes: how much attention the observed queries pay to each key."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from llm_accel.kernels.column_votes.launch import column_votes as column_votes_triton
from llm_accel.kernels.column_votes.reference import column_votes_reference
from llm_accel.kernels.dispatch import Backend, Op, Problem, torch_backend, why_not_triton

OP = Op(
    "column_votes",
    Backend(
        "triton",
        column_votes_triton,
        why_not_triton,
        "Triton kernels, log-sum-exp of rows and sums of columns",
    ),
    torch_backend(column_votes_reference, "blocked over keys"),
)


def column_votes(
    query: Tensor,
    key: Tensor,
    start: Tensor | None,
    *,
    heads: int,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    group: Literal["mean", "max", "sum"] = "mean",
    round_to: torch.dtype | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Attention probabilities of the observed queries, summed over the queries, reduced over each group of heads.

    Args:
        query: [B, Hq, W, D], post-RoPE; row ``i`` belongs to slot ``S - W + i`` and sees slots up to its own.
        key: [B, H, S, D], post-RoPE; query head ``h`` attends to key head ``h // (Hq // H)``.
        start: first real slot of each row, int64 [B], or of each key head, int64 [B, H]; None when no row is padded.
            Rows right-aligned.
        heads: number of groups that the Hq query heads are reduced to, in order.
        scaling: softmax scale.
        softcap: logit soft cap, applied before the softmax.
        sinks: learned sink logits [Hq] that take part in the softmax and in no column.
        group: reduction over the query heads of a group.
        round_to: dtype that probabilities are rounded to before they are summed; None keeps fp32.
        lse: log-sum-exp of the logits that each query sees, learned sinks included, fp32 [B, Hq, W] in natural units,
            as attention kernels return it; of queries that see nothing anything. Without it every logit is computed
            twice, for the log-sum-exp first.

    Returns:
        fp32 [B, heads, S], zero where no observed query may look.
    """
    run = OP.choose(Problem.of(query, key)).run
    return run(query, key, start, heads, scaling, softcap, sinks, group, round_to, lse)  # type: ignore[no-any-return]
