"""Cache compaction on Triton: tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_accel.kernels.launch import Launch, ceil_div, next_power_of_2, operation, strides, unit_stride

TILE = 8192  # elements that a program moves at once
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def plan(indices: Tensor, keys: Tensor, values: Tensor, scores: Tensor | None) -> tuple[list[Tensor], list[Launch]]:
    """The copies, still to be filled, and the launch that fills them."""
    from llm_accel.kernels.compaction import triton_kernels as kernels

    given = [unit_stride(tensor) for tensor in (keys, values, *([] if scores is None else [scores]))]
    batch, heads, count = indices.shape
    copies = [tensor.new_empty(batch, heads, count, *tensor.shape[3:]) for tensor in given]
    sources = [tensor.view(_INTEGERS[tensor.element_size()]) for tensor in given]
    targets = [tensor.view(_INTEGERS[tensor.element_size()]) for tensor in copies]
    dim, width, indices = keys.shape[-1], values.shape[-1], unit_stride(indices)
    block_d, block_dv = next_power_of_2(dim, least=16), next_power_of_2(width, least=16)
    block_n = max(16, TILE // max(block_d, block_dv))
    launch = Launch(
        kernels.gather_kernel,
        (ceil_div(count, block_n), batch * heads),
        {
            **{"indices": indices, "keys": sources[0], "values": sources[1]},
            **{"new_keys": targets[0], "new_values": targets[1]},
            **{"scores": None if scores is None else sources[2], "new_scores": None if scores is None else targets[2]},
            **{"heads": heads, "count": count},
            **strides("i", indices, "bh"),
            **strides("k", sources[0], "bhs"),
            **strides("v", sources[1], "bhs"),
            **({"s_b": 0, "s_h": 0} if scores is None else strides("s", sources[2], "bh")),
        },
        {"D": dim, "DV": width, "BLOCK_D": block_d, "BLOCK_DV": block_dv, "BLOCK_N": block_n},
        warps=4,
        stages=1,
    )
    return copies, [launch]


def _fake(indices: Tensor, keys: Tensor, values: Tensor, scores: Tensor | None) -> list[Tensor]:
    given = (keys, values) if scores is None else (keys, values, scores)
    return [tensor.new_empty(*indices.shape, *tensor.shape[3:]) for tensor in given]


gather_entries = operation("gather_entries", plan, _fake)
