"""Host side of the Triton kernels: how many chunks and queries a program gets. What each step computes is said in
:mod:`llm_accel.kernels.hip_select.reference`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llm_accel.kernels.dispatch import interpreting
from llm_accel.kernels.hip_select import reference
from llm_accel.kernels.hip_select.candidates import FIRST, SAMPLED, Keys, levels
from llm_accel.kernels.launch import Launch, ceil_div, next_power_of_2, operation, strides

MOST = 4096  # chunks among which a program finds the best
ENTERING = 1024  # chunks that a program of those that enter writes


def enter(
    kept: Tensor | None, then: Tensor | None, end: Tensor, chunk: int, part: int, sink: int, fresh: int
) -> Tensor:
    """The chunks that enter a stage."""
    return _enter(kept, then, end, chunk, part, sink, fresh)  # type: ignore[no-any-return]


def level(representative: Tensor, keys: Keys, end: Tensor, scaling: float) -> Tensor:
    """How high the products of each query stand; representatives are rounded to the dtype of the keys."""
    return _level(representative, keys.rows, keys.origin, keys.last, end, scaling)  # type: ignore[no-any-return]


def score(
    representative: Tensor,
    keys: Keys,
    starts: Tensor,
    end: Tensor,
    chunk: int,
    exact: bool,
    level: Tensor | None = None,
) -> Tensor:
    """The best key found in each chunk, -inf where a chunk is absent; representatives are rounded to the dtype of the
    keys."""
    arguments = (representative, keys.rows, keys.origin, keys.last, starts, end, chunk, exact, level)
    return _score(*arguments)  # type: ignore[no-any-return]


def keep(score: Tensor, starts: Tensor, count: int) -> Tensor:
    """The chunks with the best scores, found by bisecting the scores: nothing is sorted."""
    if starts.shape[-1] > MOST:
        return reference.keep(score, starts, count)
    return _keep(score, starts, count)  # type: ignore[no-any-return]


def plan_enter(
    kept: Tensor | None, then: Tensor | None, end: Tensor, chunk: int, part: int, sink: int, fresh: int
) -> tuple[Tensor, list[Launch]]:
    """The chunks, still to be written, and the launch that writes them."""
    from llm_accel.kernels.hip_select.triton_steps import enter_kernel

    starts = _fake_enter(kept, then, end, chunk, part, sink, fresh)
    batch, heads, blocks, total = starts.shape
    held = end if kept is None else kept.contiguous()
    then_b, then_n = (0, 0) if then is None else _row_strides(then)
    end_b, end_n = _row_strides(end)
    launch = Launch(
        enter_kernel,
        (batch * heads * blocks, ceil_div(total, ENTERING)),
        {
            **{"kept": held, "then": then, "end": end, "starts": starts},
            **{"heads": heads, "blocks": blocks, "old": total - fresh, "total": total, "sink": sink},
            **{"e_b": end_b, "e_n": end_n, "t_b": then_b, "t_n": then_n},
        },
        {"CHUNK": chunk, "PART": part, "BLOCK": ENTERING},
        warps=4,
        stages=1,
    )
    return starts, [launch]


def plan_level(
    representative: Tensor, rows: Tensor, origin: Tensor, last: Tensor, end: Tensor, scaling: float
) -> tuple[Tensor, list[Launch]]:
    """The levels, still to be filled, and the launch that fills them."""
    from llm_accel.kernels.hip_select.triton_steps import level_kernel

    batch, heads, blocks, queries, dim = representative.shape
    block_d, wide = next_power_of_2(dim, 16), rows.dtype == torch.float32
    found = torch.empty(representative.shape[:4], dtype=torch.float32, device=representative.device)
    end_b, end_n = _row_strides(end)
    launch = Launch(
        level_kernel,
        (blocks, batch * heads),
        {
            **{"representative": representative.contiguous(), "keys": rows},
            **{"origin": origin.expand(batch, heads, 1, 1).contiguous()},
            **{"last": last.expand(batch, heads, 1, 1).contiguous(), "end": end, "level": found},
            **{"scaling": scaling, "heads": heads, "blocks": blocks, "k_s": rows.stride(0)},
            **{"e_b": end_b, "e_n": end_n},
        },
        {
            **{"FIRST": FIRST, "SAMPLED": SAMPLED, "R": queries, "D": dim, "BD": block_d},
            **{"BR": min(16 if wide else 64, next_power_of_2(queries, 16)), "BS": 16 if wide else 32},
            **{"UPCAST": interpreting()},
        },
        warps=8 if wide or block_d > 128 else 4,
        stages=1,
    )
    return found, [launch]


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
    end_b, end_n = _row_strides(end)
    launch = Launch(
        stage_score_kernel,
        (blocks, ceil_div(chunks, columns), batch * heads),
        {
            "representative": representative.to(rows.dtype).contiguous(),
            "keys": rows,
            "origin": origin.expand(batch, heads, 1, 1).contiguous(),
            "last": last.expand(batch, heads, 1, 1).contiguous(),
            "starts": starts,
            "end": end,
            "level": representative if level is None else level.contiguous(),
            "score": score,
            "heads": heads,
            "blocks": blocks,
            "chunks": chunks,
            "k_s": rows.stride(0),
            **strides("s", starts, "bhn"),
            **{"e_b": end_b, "e_n": end_n},
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


def plan_keep(score: Tensor, starts: Tensor, count: int) -> tuple[Tensor, list[Launch]]:
    """The chunks that are kept, still to be written, and the launch that writes them."""
    from llm_accel.kernels.hip_select.triton_steps import keep_kernel

    kept, (batch, heads, blocks, chunks) = _fake_keep(score, starts, count), starts.shape
    block = next_power_of_2(chunks, 128)
    launch = Launch(
        keep_kernel,
        (batch * heads * blocks,),
        {
            **{"score": score, "starts": starts, "kept": kept},
            **{"heads": heads, "blocks": blocks, "chunks": chunks, "count": count},
            **strides("c", score, "bhn"),
            **strides("s", starts, "bhn"),
        },
        {"BLOCK": block},
        warps=min(16, max(1, block // 256)),
        stages=1,
    )
    return kept, [launch]


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


def _row_strides(end: Tensor) -> tuple[int, int]:
    """Of the rows and the query blocks of a position for each of them, int64 [B or 1, 1, n, 1]."""
    return end.stride(0) if end.shape[0] > 1 else 0, end.stride(2) if end.shape[2] > 1 else 0


def _fake_enter(
    kept: Tensor | None, then: Tensor | None, end: Tensor, chunk: int, part: int, sink: int, fresh: int
) -> Tensor:
    shape = (end.shape[0], 1, end.shape[2]) if kept is None else kept.shape[:3]
    return end.new_empty(*shape, (0 if kept is None else kept.shape[3] * (chunk // part)) + fresh)


def _fake_level(representative: Tensor, *_: Any) -> Tensor:
    return torch.empty(representative.shape[:4], dtype=torch.float32, device=representative.device)


def _fake_score(representative: Tensor, rows: Tensor, origin: Tensor, last: Tensor, starts: Tensor, *_: Any) -> Tensor:
    return torch.empty(starts.shape, dtype=torch.float32, device=starts.device)


def _fake_keep(score: Tensor, starts: Tensor, count: int) -> Tensor:
    return starts.new_empty(*starts.shape[:3], count)


_enter = operation("hip_enter", plan_enter, _fake_enter)
_level = operation("hip_level", plan_level, _fake_level)
_score = operation("hip_stage_score", plan, _fake_score)
_keep = operation("hip_keep", plan_keep, _fake_keep)
