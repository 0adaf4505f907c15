"""Slot decode on Triton: tiles and splits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llm_accel.kernels.dispatch import interpreting
from llm_accel.kernels.launch import Launch, ceil_div, next_power_of_2, operation, strides, unit_stride
from llm_accel.kernels.splits import combine, split_count, tiles

SCORE_BLOCK = 2048  # slots that a program of scores holds at once


def plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    positions: Tensor,
    start: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    decay: float,
    keep_first: int,
    keep_recent: int,
    per_query: bool,
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Launch]]:
    """Output, scores and victims, still to be filled, and the launches that fill them."""
    from llm_accel.kernels.slot_decode import triton_kernels as kernels

    query, key, value, scores, positions = (unit_stride(part) for part in (query, key, value, scores, positions))
    batch, query_heads, _, dim = query.shape
    kv_heads, slots, width = key.shape[1], key.shape[2], value.shape[3]
    heads, group, rows = scores.shape[1], query_heads // kv_heads, batch * query_heads
    start = None if start is None else start.contiguous()
    block_d, block_dv = next_power_of_2(dim, least=16), next_power_of_2(width, least=16)
    block_m, block_n, stages = tiles(query.dtype, max(block_d, block_dv))
    block_m = min(block_m, next_power_of_2(group, least=16))
    row_tiles = ceil_div(group, block_m)
    splits = split_count(row_tiles * batch * kv_heads, slots)
    span = ceil_div(ceil_div(slots, splits), block_n) * block_n
    splits = max(1, ceil_div(slots, span or 1))
    mixed = query.new_empty(splits, rows, width, dtype=torch.float32)
    lse = query.new_empty(splits, rows, dtype=torch.float32)
    logits = query.new_empty(rows, slots, dtype=torch.float32)
    output, total = query.new_empty(batch, 1, query_heads, width), query.new_empty(rows, dtype=torch.float32)
    updated, victims = (
        torch.empty_like(scores, memory_format=torch.contiguous_format),
        positions.new_empty(batch, heads),
    )
    split = Launch(
        kernels.slot_split_kernel,
        (row_tiles, splits, batch * kv_heads),
        {
            **{"query": query, "key": key, "value": value, "start": start, "mixed": mixed, "lse": lse},
            **{"logits": logits, "scaling": scaling, "softcap": softcap or 1.0},
            **{"heads": kv_heads, "slots": slots, "span": span},
            **strides("q", query, "bh"),
            **strides("k", key, "bhs"),
            **strides("v", value, "bhs"),
        },
        {
            **{"GROUP": group, "D": dim, "DV": width, "BLOCK_D": block_d, "BLOCK_DV": block_dv},
            **{"BLOCK_M": block_m, "BLOCK_N": block_n, "HAS_SOFTCAP": softcap is not None, "UPCAST": interpreting()},
        },
        warps=4,
        stages=stages,
    )
    score = Launch(
        kernels.score_kernel,
        (batch * heads,),
        {
            **{"logits": logits, "lse": total, "scores": scores, "positions": positions, "start": start},
            **{"updated": updated, "victims": victims, "decay": decay},
            **{"heads": heads, "slots": slots, "keep_first": keep_first, "keep_recent": keep_recent},
            **strides("s", scores, "bh"),
            **strides("p", positions, "bh"),
        },
        {
            **{"GROUP": query_heads // heads, "BLOCK_N": SCORE_BLOCK},
            **{"PER_QUERY": per_query},
        },
        warps=16,
        stages=1,
    )
    return (output, updated, victims), [split, combine(mixed, lse, sinks, output, total), score]


def _fake(
    query: Tensor, key: Tensor, value: Tensor, scores: Tensor, positions: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    output = query.new_empty(query.shape[0], 1, query.shape[1], value.shape[3])
    updated = torch.empty_like(scores, memory_format=torch.contiguous_format)
    return output, updated, positions.new_empty(positions.shape[:2])


slot_decode = operation("slot_decode", plan, _fake)
