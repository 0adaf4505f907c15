"""Slot write: one new entry per head takes the place of an old one, and what is known of the slots follows."""

from __future__ import annotations

from torch import Tensor

from llm_accel.kernels.dispatch import Backend, Op, Problem, torch_backend, why_no_triton
from llm_accel.kernels.gradient import is_recorded
from llm_accel.kernels.slot_write.launch import slot_write as slot_write_triton
from llm_accel.kernels.slot_write.reference import slot_write_reference

OP = Op(
    "slot_write",
    Backend("triton", slot_write_triton, lambda problem: why_no_triton(problem.device), "one Triton kernel"),
    torch_backend(slot_write_reference, "one scatter per tensor"),
)


def slot_write(
    keys: Tensor,
    values: Tensor,
    new_key: Tensor,
    new_value: Tensor,
    spare: Tensor,
    positions: Tensor,
    scores: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Writes one entry per head into ``keys`` and ``values``, in place.

    Args:
        keys: [B, H, P, D], any dtype.
        values: [B, H, P, Dv].
        new_key: [B, H, 1, D].
        new_value: [B, H, 1, Dv].
        spare: the slot that is overwritten, int64 [B, H].
        positions: original position of each slot, int64 [B, H, P].
        scores: of each slot, fp32 [B, H, P], or None.

    Returns:
        Positions, the new entry's one above the highest, and scores, its own 0; in memory of their own.
    """
    problem = Problem(keys.device, keys.dtype, max(keys.shape[-1], values.shape[-1]))
    # a kernel has no gradient, and what is written may have one
    recorded = is_recorded(keys, values, new_key, new_value)
    run = slot_write_reference if recorded else OP.choose(problem).run
    found = run(keys, values, new_key, new_value, spare, positions, scores)
    return found[0], None if scores is None else found[1]
