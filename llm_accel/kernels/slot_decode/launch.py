"""Slot decode on Triton: tiles, splits, and the configurations that are shipped."""

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
        stages=min(stages, 3),  # with no table between the loads all of them are staged, and 3 fit into 99 KiB
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
            **{"GROUP": query_heads // heads, "BLOCK_N": min(SCORE_BLOCK, next_power_of_2(slots, least=16))},
            **{"PER_QUERY": per_query},
        },
        warps=8,
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


def shipped() -> dict[str, list[Launch]]:
    """Plans of the configurations that the ahead-of-time check compiles."""
    return {
        **{f"decode {dim} bf16": _example(dim, torch.bfloat16) for dim in (64, 80, 96, 128, 256)},
        **{f"decode {dim} fp32": _example(dim, torch.float32) for dim in (64, 128, 256)},
        "decode 128 fp16": _example(128, torch.float16),
        "decode 128 bf16 mean": _example(128, torch.bfloat16, per_query=True),
        "decode 256 bf16 softcap padded": _example(256, torch.bfloat16, softcap=50.0, padded=True),
        "decode 64 bf16 sinks group 8": _example(64, torch.bfloat16, sinks=True, group=8),
        "decode 128 bf16 group 7": _example(128, torch.bfloat16, group=7),
        "decode 192 bf16 latents": _example(192, torch.bfloat16, kv_heads=16, group=1, heads=1),
    }


def _example(
    dim: int,
    dtype: torch.dtype,
    kv_heads: int = 8,
    group: int = 4,
    heads: int | None = None,
    slots: int = 4097,
    softcap: float | None = None,
    sinks: bool = False,
    padded: bool = False,
    per_query: bool = False,
) -> list[Launch]:
    with torch.device("meta"):
        query = torch.empty(1, kv_heads * group, 1, dim, dtype=dtype)
        key = torch.empty(1, kv_heads, slots, dim, dtype=dtype)
        scores = torch.empty(1, heads or kv_heads, slots)
        positions = torch.empty(scores.shape, dtype=torch.int64)
        start = torch.empty(1, dtype=torch.int64) if padded else None
        learned = torch.empty(kv_heads * group, dtype=dtype) if sinks else None
    rest = (dim**-0.5, softcap, learned, 1.0, 4, 2048, per_query)
    return plan(query, key, key, scores, positions, start, *rest)[1]
