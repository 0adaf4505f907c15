"""Host side of the Triton kernel: how many keys, heads and warps a program gets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm_accel.kernels.block_list import BlockList
from llm_accel.kernels.dispatch import interpreting
from llm_accel.kernels.launch import SHARED_MEMORY, Launch, next_power_of_2, operation, strides, unit_stride
from llm_accel.kernels.splits import combine, split_count

AHEAD_OF_TIME = 80  # the architecture to plan for where there is no device


def block_sparse_attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: BlockList,
    start: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`llm_accel.kernels.block_sparse.block_sparse_attention`; output and log-sum-exp."""
    fields = vars(blocks).values()  # PyTorch's registry takes tensors and numbers only
    return _operation(query, key, value, start, scaling, softcap, sinks, *fields)  # type: ignore[no-any-return]


def plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    block_q: int,
    block_k: int,
    ptr: Tensor,
    n_full: Tensor,
    n_listed: Tensor,
    idx: Tensor,
    sink: int,
    window_start: Tensor,
    window: int | None,
) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """Output and log-sum-exp, still to be filled, and the launches that fill them. A single query block gives few
    programs, so its keys are shared out; how many the lists name is known on the device alone."""
    from llm_accel.kernels.block_sparse.triton_kernels import block_sparse_kernel

    blocks = BlockList(block_q, block_k, ptr, n_full, n_listed, idx, sink, window_start, window)
    batch, heads, count, dim = query.shape
    query, key, value = unit_stride(query), unit_stride(key), unit_stride(value)
    width, rows = value.shape[-1], batch * heads * count
    sharing = heads // max(key.shape[1], blocks.heads)  # query heads with the same keys and list
    tiling = Tiling.of(query, value, blocks.block_q, blocks.block_k, sharing)
    # along the first axis, which alone may be longer than 65535, what grows with the prompt
    programs = (blocks.count * (blocks.block_q // tiling.rows), batch * heads // tiling.pack)
    splits = split_count(programs[0] * programs[1], key.shape[2]) if blocks.count == 1 else 1
    output = query.new_zeros(batch, count, heads, width)  # queries of padding are never written
    lse = torch.full((splits, batch, heads, count), float("-inf"), dtype=torch.float32, device=query.device)
    mixed = query.new_empty(splits, rows, width, dtype=torch.float32) if splits > 1 else output
    learned = sinks if splits == 1 else None  # they count once, when the shares are combined
    launch = Launch(
        block_sparse_kernel,
        (*programs, splits),
        {
            "query": query,
            "key": key,
            "value": value,
            "output": mixed,
            "lse": lse,
            "start": start,
            "sinks": learned,
            "ptr": blocks.ptr,
            "n_full": blocks.n_full,
            "n_listed": blocks.n_listed,
            "idx": blocks.idx,
            "window_start": blocks.window_start,
            "scaling": scaling,
            "softcap": softcap,
            "queries": count,
            "slots": key.shape[2],
            "blocks": blocks.count,
            "sink": blocks.sink,
            "window": blocks.window,
            "heads": heads,
            "group": heads // key.shape[1],
            "per_list": heads // blocks.heads,
            **strides("q", query, "bht"),
            **strides("k", key, "bhs"),
            **strides("v", value, "bhs"),
        },
        {
            "D": dim,
            "DV": width,
            "BD": next_power_of_2(dim, 16),
            "BDV": next_power_of_2(width, 16),
            "BQ": blocks.block_q,
            "BK": blocks.block_k,
            "BN": tiling.keys,
            "ROWS": tiling.rows,
            "PACK": tiling.pack,
            "HAS_START": start is not None,
            "HAS_SINKS": learned is not None,
            "HAS_SOFTCAP": softcap is not None,
            "HAS_WINDOW": blocks.window is not None,
            "PARTIAL": splits > 1,
            "UPCAST": interpreting(),
        },
        tiling.warps,
        tiling.stages,
    )
    if splits == 1:
        return (output, lse[0]), [launch]
    total = torch.empty_like(lse[0])
    return (output, total), [launch, combine(mixed, lse.view(splits, rows), sinks, output, total, unit=math.log(2))]


def _fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, heads, count, _dim = query.shape
    output = query.new_empty(batch, count, heads, value.shape[-1])
    return output, query.new_empty(batch, heads, count, dtype=torch.float32)


_operation = operation("block_sparse_attention", plan, _fake)


@dataclass(frozen=True)
class Tiling:
    """What one program works on.

    Attributes:
        rows: queries of a program, all of a block or a part.
        pack: query heads of a program, which share its keys.
        keys: keys of a tile.
        warps: warps of a program.
        stages: tiles on their way from memory at once.
    """

    rows: int
    pack: int
    keys: int
    warps: int
    stages: int

    @staticmethod
    def of(query: Tensor, value: Tensor, block_q: int, block_k: int, sharing: int) -> Tiling:
        """As many stages as shared memory holds, three at most."""
        width, size = max(query.shape[-1], value.shape[-1]), query.element_size()
        dims = next_power_of_2(width, 16)
        large = width < dims == 128 and block_q == 128
        if size == 4:  # products of fp32 are no tensor-core instructions and need many registers
            most, keys = (32, 32) if dims < 128 else (16, 32)
        else:  # registers: masks of channels and of small blocks take them too, and so do few queries on few warps
            wide = dims < 128 or (block_q > 16 and (width == 128 or block_k >= 64))
            most, keys = (64 if large else 128, 64 if wide else 32) if dims <= 128 else (64, 32)
        rows = min(block_q, most)
        pack = math.gcd(sharing, most // rows)
        stages = (_shared_memory(query.device) - pack * rows * dims * size) // (2 * keys * dims * size)
        warps = 4 if pack * rows <= 64 and dims <= 128 and size < 4 and not large else 8
        return Tiling(rows, pack, keys, warps, min(max(stages, 1), 3))


def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return SHARED_MEMORY[AHEAD_OF_TIME]
    major, minor = torch.cuda.get_device_capability(device)
    return SHARED_MEMORY.get(10 * major + minor, min(SHARED_MEMORY.values()))
