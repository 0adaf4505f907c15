"""Ragged attention on Triton: tiles, splits, and the configurations that are shipped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llm_accel.kernels.dispatch import interpreting
from llm_accel.kernels.launch import Launch, ceil_div, next_power_of_2, operation, strides, unit_stride
from llm_accel.kernels.splits import combine, split_count, tiles


def plan(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, list[Launch]]:
    """The result, still to be filled, and the launches that fill it."""
    from llm_accel.kernels.ragged_decode import triton_kernels as kernels

    query, keys, values, table = (unit_stride(tensor) for tensor in (query, keys, values, table))
    batch, query_heads, count, dim = query.shape
    heads, page, width = table.shape[1], keys.shape[1], values.shape[2]
    group, rows = query_heads // heads, batch * query_heads * count
    block_d, block_dv = next_power_of_2(dim, least=16), next_power_of_2(width, least=16)
    block_m, block_n, stages = tiles(query.dtype, max(block_d, block_dv))
    block_m = min(block_m, next_power_of_2(group * count, least=16))
    row_tiles = ceil_div(group * count, block_m)
    longest = table.shape[2] * page  # what the host knows of the lengths
    splits = split_count(row_tiles * batch * heads, longest)
    mixed = query.new_empty(splits, rows, width, dtype=torch.float32)
    lse = query.new_empty(splits, rows, dtype=torch.float32)
    output = query.new_empty(batch, count, query_heads, width)
    split = Launch(
        kernels.split_kernel,
        (row_tiles, splits, batch * heads),
        {
            **{"query": query, "keys": keys, "values": values, "table": table, "lengths": lengths},
            **{"mixed": mixed, "lse": lse, "scaling": scaling, "softcap": softcap or 1.0},
            **{"heads": heads, "count": count, "rows": rows},
            **strides("q", query, "bht"),
            **strides("k", keys, "pe"),
            **strides("v", values, "pe"),
            **strides("t", table, "bh"),
            **strides("l", lengths, "bh"),
        },
        {
            **{"GROUP": group, "PAGE": page, "D": dim, "DV": width, "BLOCK_D": block_d, "BLOCK_DV": block_dv},
            **{"BLOCK_M": block_m, "BLOCK_N": block_n, "HAS_SOFTCAP": softcap is not None, "UPCAST": interpreting()},
        },
        warps=4,
        stages=stages,
    )
    return output, [split, combine(mixed, lse, sinks, output)]


def new_output(query: Tensor, keys: Tensor, values: Tensor, *_: Any) -> Tensor:
    """An empty result, for the arguments of the operation."""
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], values.shape[2])


ragged_attention = operation("ragged_attention", plan, new_output)


def shipped() -> dict[str, list[Launch]]:
    """Plans of the configurations that the ahead-of-time check compiles."""
    return {
        **{f"decode {dim} bf16": _example(dim, torch.bfloat16) for dim in (64, 80, 96, 128, 256)},
        **{f"decode {dim} fp32": _example(dim, torch.float32) for dim in (64, 80, 128, 256)},
        "decode 128 fp16": _example(128, torch.float16),
        "decode 128 bf16 short": _example(128, torch.bfloat16, pages=4),
        "decode 256 bf16 softcap": _example(256, torch.bfloat16, softcap=50.0),
        "decode 64 bf16 pages of 8": _example(64, torch.bfloat16, pages=512, page=8),
        "decode 128 bf16 pages of 8": _example(128, torch.bfloat16, pages=512, page=8),
        "decode 128 bf16 pages of 32": _example(128, torch.bfloat16, page=32),
        "decode 64 bf16 sinks": _example(64, torch.bfloat16, sinks=True, group=8),
        "8 tokens 128 bf16 group 7": _example(128, torch.bfloat16, count=8, group=7),
        "8 tokens 256 bf16 group 16": _example(256, torch.bfloat16, count=8, group=16),
    }


def _example(
    dim: int,
    dtype: torch.dtype,
    count: int = 1,
    group: int = 4,
    pages: int = 128,
    page: int = 64,
    softcap: float | None = None,
    sinks: bool = False,
) -> list[Launch]:
    with torch.device("meta"):
        query, pool = torch.empty(1, 8 * group, count, dim, dtype=dtype), torch.empty(8 * pages, page, dim, dtype=dtype)
        table = torch.empty(1, 8, pages, dtype=torch.int64)
        lengths = torch.empty(1, 8, dtype=torch.int64)
        learned = torch.empty(8 * group, dtype=dtype) if sinks else None
    return plan(query, pool, pool, table, lengths, dim**-0.5, softcap, learned)[1]
