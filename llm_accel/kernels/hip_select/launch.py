"""Host side of the Triton kernel: how many chunks and queries a program gets."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_accel.kernels.dispatch import interpreting
from llm_accel.kernels.hip_select.candidates import Keys
from llm_accel.kernels.launch import Launch, ceil_div, next_power_of_2


def stage_score_triton(
    representative: Tensor, keys: Keys, starts: Tensor, end: Tensor, chunk: int, exact: bool
) -> Tensor:
    """See :func:`llm_accel.kernels.hip_select.reference.stage_score_reference`; -inf where a chunk is absent. The
    representatives are rounded to the dtype of the keys."""
    launch = plan(representative, keys, starts, end, chunk, exact)[0]
    launch.run()
    score = launch.arguments["score"]
    assert isinstance(score, Tensor)
    return score


def plan(representative: Tensor, keys: Keys, starts: Tensor, end: Tensor, chunk: int, exact: bool) -> list[Launch]:
    """One launch, whose argument ``score`` is the result."""
    from llm_accel.kernels.hip_select.triton_kernels import stage_score_kernel

    batch, heads, blocks, chunks = starts.shape
    queries, dim = representative.shape[3:]
    single = keys.rows.dtype == torch.float32  # takes no tensor cores, and more registers
    wide = next_power_of_2(dim, 16) >= 128  # registers hold half as many representatives
    most, columns = (16, 16) if single else (32 if wide else 64, 32)
    rows = min(most, next_power_of_2(queries, 16))
    return [
        Launch(
            stage_score_kernel,
            (blocks, ceil_div(chunks, columns), batch * heads),
            {
                "representative": representative.to(keys.rows.dtype).contiguous(),
                "keys": keys.rows,
                "origin": keys.origin.expand(batch, heads, 1, 1).contiguous(),
                "last": keys.last.expand(batch, heads, 1, 1).contiguous(),
                "starts": starts.contiguous(),
                "end": end.expand(batch, heads, -1, -1).contiguous(),
                "score": torch.empty(starts.shape, device=starts.device),
                "blocks": blocks,
                "chunks": chunks,
            },
            {
                "CHUNK": chunk,
                "LEVELS": chunk.bit_length(),
                "EXACT": exact,
                "R": queries,
                "D": dim,
                "BD": next_power_of_2(dim, 16),
                "BR": rows,
                "BC": columns,
                "UPCAST": interpreting(),
            },
            4,
            2,
        )
    ]


def shipped() -> dict[str, list[Launch]]:
    """Every configuration for the ahead-of-time check."""
    plans = {}
    for dtype, dims in ((torch.bfloat16, (64, 80, 96, 128, 256)), (torch.float32, (64, 128, 256))):
        for dim in dims:
            for chunk, queries, exact in ((256, 64, False), (32, 64, False), (8, 256, True), (8, 4, True)):
                label = f"{str(dtype).removeprefix('torch.')} head_dim {dim} chunk {chunk} queries {queries}"
                plans[label] = _example(dtype, dim, chunk, queries, exact)
    return plans


def _example(dtype: torch.dtype, dim: int, chunk: int, queries: int, exact: bool) -> list[Launch]:
    """Two rows of 4 key heads."""
    keys = Keys.of(torch.empty(2, 4, 4096, dim, dtype=dtype, device="meta"), None)
    starts = torch.empty(2, 4, 64, 128, dtype=torch.int64, device="meta")
    representative = torch.empty(2, 4, 64, queries, dim, device="meta")
    return plan(representative, keys, starts, torch.empty(1, 1, 64, 1, dtype=torch.int64, device="meta"), chunk, exact)
