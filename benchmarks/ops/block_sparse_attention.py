"""Block-sparse attention: HiP's decode step, sink, window and as many chosen blocks as the budget holds."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.ops.registry import Case, Work
from llm_accel.kernels.block_list import BlockList
from llm_accel.kernels.block_sparse import block_sparse_attention

QUERY_HEADS, HEADS, DIM, BLOCK_Q, BLOCK_K = 32, 8, 128, 16, 8
SINK, WINDOW = 64, 1024


def build(batch: int, slots: int, budget: int, count: int, device: str) -> Work:
    begin = slots - WINDOW
    with torch.device(device):
        query = torch.randn(batch, QUERY_HEADS, count, DIM, dtype=torch.bfloat16)
        key, value = torch.randn(2, batch, HEADS, slots, DIM, dtype=torch.bfloat16).unbind(0)
        order = torch.rand(batch, HEADS, 1, (begin - SINK) // BLOCK_K).argsort(-1)[..., : budget // BLOCK_K]
        starts = SINK + order.sort(-1).values * BLOCK_K
        counts = torch.full((batch, HEADS, 1), starts.shape[-1], dtype=torch.int32)
        window = torch.tensor(begin)
    blocks = BlockList.from_selected(starts, counts, block_q=BLOCK_Q, block_k=BLOCK_K, sink=SINK, window_start=window)
    return Work(
        run=lambda: block_sparse_attention(query, key, value, blocks, scaling=DIM**-0.5),
        baseline=lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=True),
    )


def case(slots: int, budget: int = 2048, batch: int = 1, count: int = 1) -> Case:
    entries = batch * HEADS * (SINK + budget + WINDOW)
    return Case(
        op="block_sparse_attention",
        name=f"{QUERY_HEADS}/{HEADS}/{DIM} B={batch} T={count} S={slots} budget={budget}",
        build=partial(build, batch, slots, budget, count),
        baseline="SDPA over all slots",
        moved=entries * 2 * 2 * DIM,
        flop=4 * entries * (QUERY_HEADS // HEADS) * count * DIM,
    )


CASES = [*(case(slots) for slots in (8192, 32768, 131072)), case(32768, batch=8), case(32768, count=8)]
