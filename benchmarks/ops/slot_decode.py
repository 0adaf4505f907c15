"""Slot decode: H2O's decode step, in geometries of known models."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.ops.registry import Case, Work
from llm_accel.kernels.column_votes import column_votes
from llm_accel.kernels.slot_decode import lowest_slots, slot_decode

LLAMA_8B, QWEN_7B, GEMMA_9B = (32, 8, 128), (28, 4, 128), (16, 8, 256)


def build(heads: tuple[int, int, int], batch: int, budget: int, device: str) -> Work:
    query_heads, kv_heads, dim = heads
    slots, recent, scaling = budget + 1, budget // 2, dim**-0.5
    with torch.device(device):
        query = torch.randn(batch, query_heads, 1, dim, dtype=torch.bfloat16)
        key, value = torch.randn(2, batch, kv_heads, slots, dim, dtype=torch.bfloat16).unbind(0)
        scores = torch.rand(batch, kv_heads, slots)
        positions = torch.rand(batch, kv_heads, slots).argsort(-1)

    def baseline() -> object:
        output = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        votes = column_votes(query, key, None, heads=kv_heads, scaling=scaling, group="sum")
        return output, lowest_slots(scores + votes, positions, 4, recent, False)

    return Work(
        run=lambda: slot_decode(
            query, key, value, scores, positions, None, scaling=scaling, keep_first=4, keep_recent=recent
        ),
        baseline=baseline,
    )


def case(heads: tuple[int, int, int], budget: int, batch: int = 1) -> Case:
    query_heads, kv_heads, dim = heads
    entries = batch * kv_heads * (budget + 1)
    return Case(
        op="slot_decode",
        name=f"{query_heads}/{kv_heads}/{dim} B={batch} budget={budget}",
        build=partial(build, heads, batch, budget),
        baseline="SDPA, column votes and the choice",
        moved=entries * (2 * 2 * dim + 4 + 4 + 8),
        flop=4 * entries * (query_heads // kv_heads) * dim,
    )


CASES = [
    *(case(LLAMA_8B, budget) for budget in (512, 2048, 4096)),
    case(LLAMA_8B, 2048, batch=16),
    case(QWEN_7B, 2048),
    case(GEMMA_9B, 2048),
]
