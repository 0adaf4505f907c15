"""Block-sparse attention: each block of queries over the keys that its list names."""

from __future__ import annotations

from torch import Tensor

from llm_accel.kernels.block_list import BlockList
from llm_accel.kernels.block_sparse.launch import block_sparse_attention_triton
from llm_accel.kernels.block_sparse.reference import block_sparse_attention_reference
from llm_accel.kernels.dispatch import Backend, Op, Problem, torch_backend, why_not_triton
from llm_accel.kernels.gradient import without_gradient

OP = Op(
    "block_sparse_attention",
    Backend("triton", block_sparse_attention_triton, why_not_triton, "one program per query block and heads of a list"),
    torch_backend(block_sparse_attention_reference, "one softmax per query block over the gathered keys"),
)


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: BlockList,
    *,
    scaling: float,
    start: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal softmax attention of the newest T queries over the visible keys of ``blocks``.

    Args:
        query: [B, Hq, T, D], post-RoPE; row ``i`` belongs to slot ``S - T + i``.
        key: [B, H, S, D], post-RoPE; query head ``h`` attends to key head ``h // (Hq // H)``.
        value: [B, H, S, Dv].
        blocks: visible keys; its list heads are 1, H or Hq, its query blocks cover the T queries.
        scaling: softmax scale.
        start: first real slot of each row, int64 [B]; None when no row is padded. Rows right-aligned.
        softcap: logit soft cap, applied before the softmax.
        sinks: learned sink logits [Hq] that take part in the softmax and add nothing.

    Returns:
        [B, T, Hq, Dv] in the dtype of ``query``, 0 for rows that see nothing, and the log-sum-exp of each row, learned
        sinks included: [B, Hq, T] in fp32 (float64 for float64 queries), -inf for rows that see nothing.

    Raises:
        ValueError: if the list does not fit the tensors.
    """
    _check(query, key, value, blocks)
    run = OP.choose(Problem.of(query, key, value)).run
    arguments = (query, key, value, blocks, start, scaling, softcap, sinks)
    output, lse = without_gradient("block-sparse attention", lambda: run(*arguments), query, key, value, sinks)
    return output, lse


def _check(query: Tensor, key: Tensor, value: Tensor, blocks: BlockList) -> None:
    batch, query_heads, count, _ = query.shape
    if key.shape[:3] != value.shape[:3] or key.shape[0] != batch or query_heads % key.shape[1]:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not fit: batch and "
            "slots must agree, and the KV heads must divide the query heads."
        )
    if blocks.heads not in (1, key.shape[1], query_heads):
        raise ValueError(
            f"a block list with {blocks.heads} heads: allowed are 1, {key.shape[1]} (KV heads) and {query_heads} "
            "(query heads)."
        )
    needed = -(-count // blocks.block_q)
    if blocks.ptr.shape[0] != batch or blocks.count != needed:
        raise ValueError(
            f"the block list is for {blocks.ptr.shape[0]} rows of {blocks.count} query blocks; {batch} rows of {count} "
            f"queries are {needed} blocks of {blocks.block_q} each."
        )
