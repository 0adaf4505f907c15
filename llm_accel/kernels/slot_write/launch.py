"""Slot write on Triton: one program per row and head."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_accel.kernels.launch import Launch, next_power_of_2, operation, strides, unit_stride

BLOCK = 2048  # slots that a program looks at in one go
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def plan(
    keys: Tensor,
    values: Tensor,
    new_key: Tensor,
    new_value: Tensor,
    spare: Tensor,
    positions: Tensor,
    scores: Tensor | None,
) -> tuple[list[Tensor], list[Launch]]:
    """Positions and scores, still to be filled, and the launch that fills them and writes into keys and values."""
    from llm_accel.kernels.slot_write import triton_kernels as kernels

    (batch, heads, slots, dim), width = keys.shape, values.shape[3]
    found = [torch.empty_like(positions, memory_format=torch.contiguous_format)]
    if scores is not None:
        found.append(torch.empty_like(scores, memory_format=torch.contiguous_format))
        scores = unit_stride(scores)
    positions = unit_stride(positions)
    old_key, old_value, new_key, new_value = (
        tensor.view(_INTEGERS[tensor.element_size()])
        for tensor in (keys, values, unit_stride(new_key), unit_stride(new_value))
    )
    launch = Launch(
        kernels.write_kernel,
        (batch * heads,),
        {
            **{"keys": old_key, "values": old_value, "new_key": new_key, "new_value": new_value},
            **{"spare": spare.contiguous(), "positions": positions, "scores": scores},
            **{"new_positions": found[0], "new_scores": None if scores is None else found[1]},
            **{"heads": heads, "slots": slots},
            **strides("k", old_key, "bhs"),
            **strides("v", old_value, "bhs"),
            **strides("nk", new_key, "bh"),
            **strides("nv", new_value, "bh"),
            **strides("p", positions, "bh"),
            **({"s_b": 0, "s_h": 0} if scores is None else strides("s", scores, "bh")),
        },
        {
            **{"D": dim, "DV": width, "BLOCK_D": next_power_of_2(dim), "BLOCK_DV": next_power_of_2(width)},
            **{"BLOCK_N": BLOCK},
        },
        warps=8,
        stages=1,
    )
    return found, [launch]


def _fake(
    keys: Tensor,
    values: Tensor,
    new_key: Tensor,
    new_value: Tensor,
    spare: Tensor,
    positions: Tensor,
    scores: Tensor | None,
) -> list[Tensor]:
    known = [positions] if scores is None else [positions, scores]
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in known]


slot_write = operation("slot_write", plan, _fake, changes=("keys", "values"))
