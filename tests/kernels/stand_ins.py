"""What each operation of ours would launch on a GPU, and what it would give: with these a CPU walks through the steps
of a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llm_accel.kernels import block_sparse as block_sparse_op
from llm_accel.kernels import column_votes as column_votes_op
from llm_accel.kernels import compaction as compaction_op
from llm_accel.kernels import ragged_decode as ragged_decode_op
from llm_accel.kernels import slot_decode as slot_decode_op
from llm_accel.kernels import slot_write as slot_write_op
from llm_accel.kernels.block_list import BlockList
from llm_accel.kernels.block_sparse import launch as block_sparse
from llm_accel.kernels.column_votes import launch as column_votes
from llm_accel.kernels.compaction import launch as compaction
from llm_accel.kernels.hip_select import Keys, reference
from llm_accel.kernels.hip_select import launch as hip_select
from llm_accel.kernels.ragged_decode import launch as ragged_decode
from llm_accel.kernels.slot_decode import launch as slot_decode
from llm_accel.kernels.slot_write import launch as slot_write

PLANS = {
    "block_sparse_attention": block_sparse.plan,
    "column_votes": column_votes.plan,
    "gather_entries": compaction.plan,
    "hip_enter": hip_select.plan_enter,
    "hip_keep": hip_select.plan_keep,
    "hip_level": hip_select.plan_level,
    "hip_stage_score": hip_select.plan,
    "ragged_attention": ragged_decode.plan,
    "slot_decode": slot_decode.plan,
    "slot_write": slot_write.plan,
}


def _block_sparse(
    query: Any, key: Any, value: Any, start: Any, scaling: Any, cap: Any, sinks: Any, *fields: Any
) -> Any:
    return block_sparse_op.OP.backends[-1].run(query, key, value, BlockList(*fields), start, scaling, cap, sinks)


def _on_keys(run: Callable[..., Any]) -> Callable[..., Any]:
    def stand_in(representative: Any, rows: Any, origin: Any, last: Any, *rest: Any) -> Any:
        return run(representative, Keys(rows, origin, last), *rest)

    return stand_in


# what each kernel of ours would give, so that a CPU can walk through the steps of a GPU
STAND_INS: dict[str, Callable[..., Any]] = {
    "block_sparse_attention": _block_sparse,
    "column_votes": column_votes_op.OP.backends[-1].run,
    "gather_entries": lambda *given: [part for part in compaction_op.OP.backends[-1].run(*given) if part is not None],
    "hip_enter": reference.enter,
    "hip_keep": reference.keep,
    "hip_level": _on_keys(reference.level),
    "hip_stage_score": _on_keys(reference.score),
    "ragged_attention": ragged_decode_op.OP.backends[-1].run,
    "slot_decode": slot_decode_op.OP.backends[-1].run,
    "slot_write": slot_write_op.OP.backends[-1].run,
}
