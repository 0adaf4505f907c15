"""Ragged attention: the newest queries over a paged cache whose heads hold different numbers of entries."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_accel.kernels.dispatch import Backend, Op, Problem, torch_backend, why_not_triton
from llm_accel.kernels.gradient import without_gradient
from llm_accel.kernels.launch import as_node
from llm_accel.kernels.ragged_decode.launch import new_output
from llm_accel.kernels.ragged_decode.launch import ragged_attention as ragged_attention_triton
from llm_accel.kernels.ragged_decode.reference import ragged_attention_reference

# the reference looks up who owns a page, which no graph can: to torch.compile it is one node, as the kernel is
_opaque = as_node("ragged_attention_reference", ragged_attention_reference, new_output)

OP = Op(
    "ragged_attention",
    Backend("triton", ragged_attention_triton, why_not_triton, "Triton kernels, each head split over its own length"),
    torch_backend(ragged_attention_reference, "one partial softmax per page"),
)


def ragged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention of the newest T queries of each row over the entries of each head.

    Args:
        query: [B, Hq, T, D], post-RoPE; query head ``h`` attends to KV head ``h // (Hq // H)``. The last T entries of
            every head belong to these queries, causal among themselves.
        keys: pool of pages [N, page, D], post-RoPE. Every slot is finite, those that hold no entry included.
        values: pool of pages [N, page, Dv].
        table: pages of each row and head in order, int64 [B, H, M]; -1 after the last. A page has one owner.
        lengths: entries of each row and head, int64 [B, H], at least T. Entry ``i`` is slot ``i % page`` of page
            ``i // page`` of its owner.
        scaling: softmax scale.
        softcap: logit soft cap, applied before the softmax.
        sinks: learned sink logits [Hq] that take part in the softmax and add nothing.

    Returns:
        [B, T, Hq, Dv] in the dtype of ``query``.
    """
    head_dim = max(keys.shape[-1], values.shape[-1])
    problem = Problem(query.device, query.dtype, head_dim, query.shape[1] // table.shape[1])
    run = OP.choose(problem).run
    if torch.compiler.is_compiling() and run is ragged_attention_reference:
        run = _opaque
    arguments = (query, keys, values, table, lengths, scaling, softcap, sinks)
    (output,) = without_gradient("ragged attention", lambda: (run(*arguments),), query, keys, values, sinks)
    return output
