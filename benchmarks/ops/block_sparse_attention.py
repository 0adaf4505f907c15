"""Block-sparse attention: HiP's decode step, sink, window and as many chosen blocks as the budget holds; and prompts
whose query blocks have chosen blocks at random, against the same kernel on all pairs."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.ops.registry import Case, Work
from llm_accel.kernels.block_list import BlockList, aligned_window
from llm_accel.kernels.block_sparse import block_sparse_attention
from llm_accel.kernels.block_sparse.launch import plan
from llm_accel.kernels.hip_select import ABSENT

QUERY_HEADS, HEADS, DIM, BLOCK_Q, BLOCK_K = 32, 8, 128, 16, 8
SINK, WINDOW, PREFILL_Q = 64, 1024, 64


def step_problem(
    batch: int, slots: int, budget: int, count: int, window: int, device: str
) -> tuple[BlockList, list[torch.Tensor]]:
    """The list of one query block, and query, key and value of random numbers, bf16."""
    begin = slots - window
    with torch.device(device):
        query = torch.randn(batch, QUERY_HEADS, count, DIM, dtype=torch.bfloat16)
        key, value = torch.randn(2, batch, HEADS, slots, DIM, dtype=torch.bfloat16).unbind(0)
        order = torch.rand(batch, HEADS, 1, (begin - SINK) // BLOCK_K).argsort(-1)[..., : budget // BLOCK_K]
        starts = SINK + order.sort(-1).values * BLOCK_K
        counts = torch.full((batch, HEADS, 1), starts.shape[-1], dtype=torch.int32)
        start = torch.tensor(begin)
    blocks = BlockList.from_selected(starts, counts, block_q=BLOCK_Q, block_k=BLOCK_K, sink=SINK, window_start=start)
    return blocks, [query, key, value]


def build(batch: int, slots: int, budget: int, count: int, device: str) -> Work:
    blocks, tensors = step_problem(batch, slots, budget, count, WINDOW, device)
    return Work(
        run=lambda: block_sparse_attention(*tensors, blocks, scaling=DIM**-0.5),
        baseline=lambda: F.scaled_dot_product_attention(*tensors, enable_gqa=True),
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


def prompt_problem(
    slots: int, budget: int, block_k: int, window: int, device: str
) -> tuple[BlockList, list[torch.Tensor]]:
    """Lists of blocks chosen at random for a whole prompt, and its query, key and value, bf16."""
    with torch.device(device):
        query = torch.randn(1, QUERY_HEADS, slots, DIM, dtype=torch.bfloat16)
        key, value = torch.randn(2, 1, HEADS, slots, DIM, dtype=torch.bfloat16).unbind(0)
        positions = torch.arange(0, slots, PREFILL_Q)[None]
        begin = aligned_window(positions, window=window, sink=SINK, block_k=block_k)[:, None].expand(1, HEADS, -1)
        places = torch.arange(SINK, slots, block_k)
        draw = torch.rand(1, HEADS, positions.shape[1], len(places)).masked_fill_(places >= begin[..., None], -1.0)
        counts = ((begin - SINK) // block_k).clamp(max=budget // block_k)
        found = draw.topk(min(budget // block_k, len(places))).indices
        order = torch.arange(found.shape[-1]) < counts[..., None]
        starts = places[found].masked_fill(~order, ABSENT).sort(-1).values
    chosen = BlockList.from_selected(starts, counts, block_q=PREFILL_Q, block_k=block_k, sink=SINK, window_start=begin)
    return chosen, [query, key, value]


def build_prefill(slots: int, budget: int, block_k: int, device: str) -> Work:
    chosen, tensors = prompt_problem(slots, budget, block_k, WINDOW, device)
    positions = torch.arange(0, slots, PREFILL_Q, device=device)[None]
    everything = BlockList.sink_window(positions, block_q=PREFILL_Q, block_k=block_k, sink=0, window=slots)

    def attend(blocks: BlockList) -> object:
        return block_sparse_attention(*tensors, blocks, scaling=DIM**-0.5)

    return Work(
        run=lambda: attend(chosen),
        baseline=lambda: attend(everything),
        launches=lambda: plan(*tensors, None, DIM**-0.5, None, None, *vars(chosen).values())[1],
    )


def prefill(slots: int, block_k: int, budget: int = 2048, stages: tuple[int, ...] = ()) -> Case:
    """Visible pairs of a query block: sink, chosen blocks, and the window up to each query."""
    pairs = 0
    for first in range(0, slots, PREFILL_Q):
        begin = max(SINK, (first - WINDOW + 1) // block_k * block_k)
        ahead = min(budget, begin - SINK) + min(SINK, begin)
        pairs += sum(min(ahead, row + 1) + max(0, row + 1 - begin) for row in range(first, first + PREFILL_Q))
    return Case(
        op="block_sparse_attention",
        name=f"{QUERY_HEADS}/{HEADS}/{DIM} prefill S={slots} block={block_k} budget={budget}",
        build=partial(build_prefill, slots, budget, block_k),
        baseline="the same kernel on all pairs",
        moved=2 * DIM * slots * (2 * QUERY_HEADS + 2 * HEADS),
        flop=4 * DIM * QUERY_HEADS * pairs,
        baseline_flop=4 * DIM * QUERY_HEADS * slots * (slots + 1) // 2,
        stages=stages,
    )


CASES = [*(case(slots) for slots in (8192, 32768, 131072)), case(32768, batch=8), case(32768, count=8)]
CASES += [prefill(32768, 64, stages=(2, 4)), prefill(32768, 8, stages=(2, 4))]
