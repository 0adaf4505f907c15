"""Ragged attention on Triton: tiles and splits."""

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
        warps=8 if block_m > 32 else 4,  # registers: the sums of 64 rows are too many for 128 threads
        stages=stages,
    )
    return output, [split, combine(mixed, lse, sinks, output)]


def new_output(query: Tensor, keys: Tensor, values: Tensor, *_: Any) -> Tensor:
    """An empty result, for the arguments of the operation."""
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], values.shape[2])


ragged_attention = operation("ragged_attention", plan, new_output)
