"""Ragged attention: decode steps over heads of equal and of skewed lengths."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.ops.registry import Case, Work
from llm_accel.kernels.ragged_decode import ragged_attention
from llm_accel.kernels.ragged_decode.launch import plan

QUERY_HEADS, HEADS, DIM, PAGE = 32, 8, 128, 64


def lengths_of(kept: int, skew: int) -> list[int]:
    """Entries of each head, ``kept`` on average; the longest holds ``skew`` times the shortest."""
    shares = [1 + (skew - 1) * head / (HEADS - 1) for head in range(HEADS)]
    return [max(PAGE, round(kept * HEADS * share / sum(shares) / PAGE) * PAGE) for share in shares]


def problem(batch: int, kept: int, skew: int, count: int, device: str) -> list[torch.Tensor]:
    """Query, pools of keys and values, table and lengths."""
    lengths = lengths_of(kept, skew)
    pages = [length // PAGE for length in lengths]
    table = torch.full((batch, HEADS, max(pages)), -1)
    used = 0
    for row in range(batch):
        for head, number in enumerate(pages):
            table[row, head, :number] = torch.arange(used, used + number)
            used += number
    with torch.device(device):
        keys, values = torch.randn(2, used, PAGE, DIM, dtype=torch.bfloat16).unbind(0)
        query = torch.randn(batch, QUERY_HEADS, count, DIM, dtype=torch.bfloat16)
        held = torch.tensor(lengths).expand(batch, -1).contiguous()
    return [query, keys, values, table.to(device), held]


def build(batch: int, kept: int, skew: int, count: int, device: str) -> Work:
    tensors = problem(batch, kept, skew, count, device)
    longest = max(lengths_of(kept, skew))
    padded = torch.randn(batch, HEADS, longest, DIM, dtype=torch.bfloat16, device=device)
    return Work(
        run=lambda: ragged_attention(*tensors, scaling=DIM**-0.5),
        baseline=lambda: F.scaled_dot_product_attention(tensors[0], padded, padded, enable_gqa=True),
        launches=lambda: plan(*tensors, DIM**-0.5, None, None)[1],
    )


def case(kept: int, skew: int = 1, batch: int = 1, count: int = 1, stages: tuple[int, ...] = ()) -> Case:
    entries = batch * sum(lengths_of(kept, skew))
    return Case(
        op="ragged_attention",
        name=f"{QUERY_HEADS}/{HEADS}/{DIM} B={batch} T={count} kept={kept} skew 1:{skew}",
        build=partial(build, batch, kept, skew, count),
        baseline="SDPA, every head padded to the longest",
        moved=entries * 2 * 2 * DIM,
        flop=4 * entries * (QUERY_HEADS // HEADS) * count * DIM,
        stages=stages,
    )


CASES = [
    *(case(kept) for kept in (512, 2048, 4096)),
    case(32768, stages=(2, 4, 5)),
    *(case(kept, skew=8) for kept in (512, 4096, 32768)),
    case(4096, skew=8, batch=16),
    case(4096, skew=8, count=8),
]
