"""Column votes on Triton: tiles and grids."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from llm_accel.kernels.dispatch import interpreting
from llm_accel.kernels.launch import Launch, ceil_div, next_power_of_2, operation, strides, unit_stride

LOG2E = math.log2(math.e)
PROGRAMS = 264  # two for each multiprocessor of the largest GPU; fewer leave it idle
LEAST_SPAN = 512  # slots that are worth a program of their own


def tiles(dtype: torch.dtype, block_d: int) -> tuple[int, int, int]:
    """Largest row block, slot block and stages; bf16 at 128 channels takes 81 KiB on sm_80 and 112 KiB on sm_90."""
    if dtype == torch.float32:
        return (16, 16, 2) if block_d > 64 else (32, 32, 2)
    return (64, 64, 3) if block_d > 128 else (64, 128, 3)


def plan(
    query: Tensor,
    key: Tensor,
    start: Tensor | None,
    heads: int,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    group: str,
    round_to: torch.dtype | None,
    lse: Tensor | None = None,
) -> tuple[Tensor, list[Launch]]:
    """The result, still to be filled, and the launches that fill it."""
    from llm_accel.kernels.column_votes import triton_kernels as kernels

    query, key = unit_stride(query), unit_stride(key)
    batch, query_heads, width, dim = query.shape
    key_heads, slots = key.shape[1], key.shape[2]
    per_key = query_heads // key_heads
    block_d = next_power_of_2(dim, least=16)
    rows, columns, stages = tiles(query.dtype, block_d)
    columns = 32 if dim < block_d == 256 else columns  # masks of channels take registers too
    shared: dict[str, Any] = {
        **{"query": query, "key": key, "start": start, "scaling": scaling, "softcap": softcap or 1.0},
        **{"width": width, "slots": slots},
        **strides("q", query, "bhw"),
        **strides("k", key, "bhs"),
        **_start_strides(start),
    }
    constants: dict[str, Any] = {
        "D": dim,
        "BLOCK_D": block_d,
        "HAS_SOFTCAP": softcap is not None,
        "UPCAST": interpreting(),
    }

    launches: list[Launch] = []
    unit = 1.0
    if lse is None:
        lse, launches = _row_lse(query, key, sinks, shared, constants, (rows, columns, stages))
    else:
        lse, unit = lse.float().contiguous(), LOG2E
    votes = query.new_empty(batch, heads, slots, dtype=torch.float32)
    per_group = query_heads // heads
    pack = 1 if group == "max" else min(per_key, per_group)
    block_m = min(rows, next_power_of_2(width * pack, least=16))
    weight = 1.0 / per_group if group == "mean" else 1.0
    launches.append(
        Launch(
            kernels.col_scores_kernel,
            (ceil_div(slots, columns), batch * heads),
            {**shared, "lse": lse, "unit": unit, "votes": votes, "weight": weight, "heads": heads},
            {
                **{**constants, "PACK": pack, "LOOPS": per_group // pack, "PER_KEY": per_key, "BLOCK_M": block_m},
                **{"BLOCK_N": columns, "MAX": group == "max", "ROUND": _triton_dtype(round_to)},
            },
            warps=8 if block_d > 128 and query.dtype != torch.float32 else 4,  # registers
            stages=stages,
        )
    )
    return votes, launches


def _row_lse(
    query: Tensor,
    key: Tensor,
    sinks: Tensor | None,
    shared: dict[str, Any],
    constants: dict[str, Any],
    tile: tuple[int, int, int],
) -> tuple[Tensor, list[Launch]]:
    """Log-sum-exp of the rows in base-2 units, fp32 [B, Hq, W], still to be filled, and what fills it: spans of the
    slots apart, then together."""
    from llm_accel.kernels.column_votes import triton_kernels as kernels

    (batch, query_heads, width, _), (key_heads, slots) = query.shape, key.shape[1:3]
    (rows, columns, stages), per_key = tile, query_heads // key_heads
    block_m = min(rows, next_power_of_2(width * per_key, least=16))
    row_tiles = ceil_div(width * per_key, block_m)
    spans = max(1, min(ceil_div(PROGRAMS, max(1, row_tiles * batch * key_heads)), slots // LEAST_SPAN))
    span = ceil_div(ceil_div(slots, spans), columns) * columns
    spans = ceil_div(slots, span) if slots else 0
    parts = query.new_empty(spans, batch, query_heads, width, dtype=torch.float32)
    launches = [
        Launch(
            kernels.row_lse_kernel,
            (row_tiles, spans, batch * key_heads),
            {**shared, "sinks": sinks, "lse": parts, "batch": batch, "heads": key_heads, "span": span},
            {**constants, "PACK": per_key, "BLOCK_M": block_m, "BLOCK_N": columns},
            warps=4,
            stages=stages,
        )
    ]
    lse = parts
    if spans > 1:
        count, lse = batch * query_heads * width, torch.empty_like(parts[0])
        arguments: dict[str, Any] = {"parts": parts, "lse": lse, "rows": count, "spans": spans}
        merge = {"BLOCK": 256}
        launches.append(Launch(kernels.merge_lse_kernel, (ceil_div(count, 256),), arguments, merge, warps=4, stages=1))
    return lse, launches


def _start_strides(start: Tensor | None) -> dict[str, int]:
    """Of a start per row, the same for all heads, or of one per row and head."""
    if start is None:
        return {"s_b": 0, "s_h": 0}
    return {"s_b": start.stride(0), "s_h": start.stride(1) if start.ndim == 2 else 0}


def _triton_dtype(dtype: torch.dtype | None) -> Any:
    import triton.language as tl

    return {None: None, torch.float32: None, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


def _fake(query: Tensor, key: Tensor, start: Tensor | None, heads: int, *_: Any) -> Tensor:
    return query.new_empty(query.shape[0], heads, key.shape[2], dtype=torch.float32)


column_votes = operation("column_votes", plan, _fake)
