"""Cache compaction: the entries that stay, copied together into tensors of their own size."""

from __future__ import annotations

from torch import Tensor

from llm_accel.kernels.compaction.launch import gather_entries as gather_entries_triton
from llm_accel.kernels.compaction.reference import gather_entries_reference
from llm_accel.kernels.dispatch import Backend, Op, Problem, torch_backend, why_no_triton
from llm_accel.kernels.gradient import is_recorded

OP = Op(
    "gather_entries",
    Backend("triton", gather_entries_triton, lambda problem: why_no_triton(problem.device), "one Triton kernel"),
    torch_backend(gather_entries_reference, "one gather per tensor"),
)


def gather_entries(
    indices: Tensor, keys: Tensor, values: Tensor, scores: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Copies chosen entries of each row and head, bit by bit.

    Args:
        indices: slots to copy, int64 [B, H, n], below S; what a negative one copies is not defined, but finite where
            all entries are.
        keys: [B, H, S, D], any dtype.
        values: [B, H, S, Dv].
        scores: [B, H, S], or None.

    Returns:
        Keys [B, H, n, D], values [B, H, n, Dv] and scores [B, H, n] or None, contiguous, in memory of their own.
    """
    problem = Problem(keys.device, keys.dtype, max(keys.shape[-1], values.shape[-1]))
    # a kernel has no gradient, and what is kept is still to be differentiated
    run = gather_entries_reference if is_recorded(keys, values) else OP.choose(problem).run
    copies = run(indices, keys, values, scores)
    return copies[0], copies[1], None if scores is None else copies[2]
