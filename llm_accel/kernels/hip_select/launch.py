"""Host side of the Triton kernel: how many chunks and queries a program gets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llm_accel.kernels.dispatch import interpreting
from llm_accel.kernels.hip_select.candidates import Keys, levels
from llm_accel.kernels.launch import Launch, ceil_div, next_power_of_2, operation


def stage_score_triton(
    representative: Tensor,
    keys: Keys,
    starts: Tensor,
    end: Tensor,
    chunk: int,
    exact: bool,
    level: Tensor | None = None,
) -> Tensor:
    """See :func:`llm_accel.kernels.hip_select.reference.stage_score_reference`; -inf where a chunk is absent. The
    representatives are rounded to the dtype of the keys."""
    arguments = (representative, keys.rows, keys.origin, keys.last, starts, end, chunk, exact, level)
    return _operation(*arguments)  # type: ignore[no-any-return]


def plan(
    representative: Tensor,
    rows: Tensor,
    origin: Tensor,
    last: Tensor,
    starts: Tensor,
    end: Tensor,
    chunk: int,
    exact: bool,
    level: Tensor | None,
) -> tuple[Tensor, list[Launch]]:
    """The scores, still to be filled, and the launch that fills them; rows, origin and last are those of ``Keys``."""
    from llm_accel.kernels.hip_select.triton_kernels import stage_score_kernel

    batch, heads, blocks, chunks = starts.shape
    queries, dim = representative.shape[3:]
    most, columns, warps, stages = tiles(rows.dtype, next_power_of_2(dim, 16), queries, exact)
    score = torch.empty(starts.shape, dtype=torch.float32, device=starts.device)
    launch = Launch(
        stage_score_kernel,
        (blocks, ceil_div(chunks, columns), batch * heads),
        {
            "representative": representative.to(rows.dtype).contiguous(),
            "keys": rows,
            "origin": origin.expand(batch, heads, 1, 1).contiguous(),
            "last": last.expand(batch, heads, 1, 1).contiguous(),
            "starts": starts.contiguous(),
            "end": end.expand(batch, heads, -1, -1).contiguous(),
            "level": representative if level is None else level.contiguous(),
            "score": score,
            "blocks": blocks,
            "chunks": chunks,
            "k_s": rows.stride(0),
        },
        {
            "CHUNK": chunk,
            "LEVELS": levels(chunk),
            "EXACT": exact,
            "FAIR": level is not None,
            "R": queries,
            "D": dim,
            "BD": next_power_of_2(dim, 16),
            "BR": min(most, next_power_of_2(queries, 16)),
            "BC": columns,
            "UPCAST": interpreting(),
        },
        warps=warps,
        stages=stages,
    )
    return score, [launch]


def tiles(dtype: torch.dtype, block_d: int, queries: int, exact: bool) -> tuple[int, int, int, int]:
    """Most queries and chunks of a program, its warps and stages. Where all keys are read, the queries of a block stay
    in shared memory, 64 KiB of them, and tiles of keys are on their way; on the way down to the best half nothing is.
    """
    if dtype == torch.float32:  # takes no tensor cores, and more registers
        return (16, 16, 8 if block_d > 128 else 4, 2) if exact else (16, 16, 4, 1)
    if exact:
        warps = 8 if queries > 64 else 4
        return (128, 32, warps, 3) if block_d > 128 else (256, 64, warps, 3)
    return 64, 32, 4, 1


def _fake(representative: Tensor, rows: Tensor, origin: Tensor, last: Tensor, starts: Tensor, *_: Any) -> Tensor:
    return torch.empty(starts.shape, dtype=torch.float32, device=starts.device)


_operation = operation("hip_stage_score", plan, _fake)
