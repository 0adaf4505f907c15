"""Slot decode: a decode step over slots that are overwritten in place, which also ranks them by attention received."""

from __future__ import annotations

from torch import Tensor

from llm_accel.kernels.dispatch import Backend, Op, Problem, torch_backend, why_not_triton
from llm_accel.kernels.slot_decode.launch import slot_decode as slot_decode_triton
from llm_accel.kernels.slot_decode.reference import lowest_slots, slot_decode_reference

__all__ = ["OP", "lowest_slots", "slot_decode"]

OP = Op(
    "slot_decode",
    Backend("triton", slot_decode_triton, why_not_triton, "Triton kernels for attention, scores and victims of a step"),
    torch_backend(slot_decode_reference, "in a model: its own attention, and column votes"),
)


def slot_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    positions: Tensor,
    start: Tensor | None,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    decay: float = 1.0,
    keep_first: int = 0,
    keep_recent: int = 0,
    per_query: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax attention of one new query per row over all slots, the scores with the attention that each slot
    received, and the slot with the lowest score (H2O, arXiv 2306.14048).

    Args:
        query: [B, Hq, 1, D], post-RoPE; query head ``h`` attends to key head ``h // (Hq // H)``.
        key: [B, H, P, D], post-RoPE, in any order of the slots, the new token among them.
        value: [B, H, P, Dv].
        scores: attention that each slot received before, fp32 [B, heads, P]; heads divide the query heads, in order.
        positions: original position of each slot, int64 [B, heads, P]; -1 where a slot is empty.
        start: first slot that is not empty in each row, int64 [B]; None when none is empty.
        scaling: softmax scale.
        softcap: logit soft cap, applied before the softmax.
        sinks: learned sink logits [Hq] that take part in the softmax and add nothing.
        decay: factor on ``scores`` before the attention of this step is added.
        keep_first: positions below this one are never the lowest.
        keep_recent: number of newest positions that are never the lowest.
        per_query: compare scores per query that could see the slot, as many as positions from its own to the newest.

    Returns:
        Output [B, 1, Hq, Dv] in the dtype of ``query``, 0 for a row without entries; new scores, fp32 [B, heads, P], in
        memory of their own; and the slots of :func:`lowest_slots` for them, int64 [B, heads].
    """
    run = OP.choose(Problem.of(query, key, value)).run
    rest = (scaling, softcap, sinks, decay, keep_first, keep_recent, per_query)
    return run(query, key, value, scores, positions, start, *rest)  # type: ignore[no-any-return]
