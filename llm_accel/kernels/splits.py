"""Attention of few queries over many entries: the entries are shared out among programs, whose results are combined.

A program leaves its share as ``mixed`` [splits, rows, Dv], weighted values over the sum of the weights, and ``lse``
[splits, rows], the log-sum-exp in base-2 units, -inf where the row sees nothing of the share; rows are those of
[B, Hq, T]. Both are fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm_accel.kernels.launch import Launch, ceil_div, next_power_of_2, strides

PROGRAMS = 264  # two for each multiprocessor of the largest GPU; fewer leave it idle
LEAST_SHARE = 128  # entries that are worth a program of their own: two tiles, both on their way at once
MOST_SPLITS = 32


def split_count(programs: int, entries: int) -> int:
    """How many shares to make of at most ``entries``, where one share of all rows takes ``programs``."""
    return max(1, min(ceil_div(PROGRAMS, max(1, programs)), entries // LEAST_SHARE, MOST_SPLITS))


def tiles(dtype: torch.dtype, block_d: int) -> tuple[int, int, int]:
    """Largest row block, entry block and stages that stay within 99 KiB of shared memory: two tiles of keys and values,
    of which one is on its way while the other is worked on."""
    if dtype == torch.float32:
        return 16, 16 if block_d > 64 else 32, 3
    return (32, 32, 3) if block_d > 128 else (64, 64, 3)


def combine(
    mixed: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    output: Tensor,
    total: Tensor | None = None,
    unit: float = 1.0,
) -> Launch:
    """The launch that combines the shares.

    Args:
        sinks: learned sink logits [Hq] that take part in the softmax and add nothing.
        output: [B, T, Hq, Dv], to be filled; 0 for rows that see nothing.
        total: log-sum-exp of each row, learned sinks included, fp32 [B, Hq, T], to be filled; -inf for rows that see
            nothing.
        unit: factor on ``total``; 1 for base-2 units.
    """
    from llm_accel.kernels.triton_utils import combine_kernel

    splits, rows, width = mixed.shape
    return Launch(
        combine_kernel,
        (rows,),
        {
            **{"mixed": mixed, "lse": lse, "sinks": sinks, "output": output, "total": total, "unit": unit},
            **{"query_heads": output.shape[2], "count": output.shape[1], "rows": rows, "splits": splits},
            **strides("o", output, "bth"),
        },
        # as many as there may be, so that a cache that grows needs no other kernel
        {"DV": width, "BLOCK_DV": next_power_of_2(width, least=16), "BLOCK_S": MOST_SPLITS},
        warps=4,
        stages=1,
    )
