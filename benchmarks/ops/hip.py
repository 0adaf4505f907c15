"""HiP, selection included: attention of a whole prompt, and decode steps over one period of its refreshes."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.ops.registry import Case, Work, captured
from llm_accel.kernels.block_sparse import block_sparse_attention
from llm_accel.kernels.hip_select import hip_select
from llm_accel.kernels.hip_select.candidates import levels
from llm_accel.methods import HiP
from llm_accel.methods.sparse.hip import make_search

QUERY_HEADS, HEADS, DIM = 32, 8, 128  # Llama-3.1-8B
LAYER, LAYERS = 16, 32  # no edge layer
SOFTMAX = {"scaling": DIM**-0.5, "softcap": None, "sinks": None}


def tensors(queries: int, slots: int, device: str) -> list[torch.Tensor]:
    """Query, key and value of random numbers, bf16."""
    with torch.device(device):
        sizes = ((QUERY_HEADS, queries), (HEADS, slots), (HEADS, slots))
        return [torch.randn(1, heads, count, DIM, dtype=torch.bfloat16) for heads, count in sizes]


def build_prefill(config: HiP, slots: int, device: str) -> Work:
    """One prompt, against causal SDPA."""
    query, key, value = tensors(slots, slots, device)
    search = make_search(config, config.budget_of(LAYER, LAYERS), few=False)

    def run() -> object:
        return block_sparse_attention(query, key, value, hip_select(query, key, search), scaling=DIM**-0.5)

    return Work(run, lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True))


def build_select(config: HiP, slots: int, device: str) -> Work:
    """The selection of a prompt, against attention over what it chose."""
    query, key, value = tensors(slots, slots, device)
    search = make_search(config, config.budget_of(LAYER, LAYERS), few=False)
    chosen = hip_select(query, key, search)
    return Work(
        run=lambda: hip_select(query, key, search),
        baseline=lambda: block_sparse_attention(query, key, value, chosen, scaling=DIM**-0.5),
    )


def build_decode(config: HiP, slots: int, device: str) -> Work:
    """As many steps as the longest refresh period has, as one graph, against as many of SDPA over all slots."""
    query, key, value = tensors(1, slots, device)
    step = config.fixed_step(LAYER, LAYERS, 1, HEADS, key.device)
    lengths = torch.full((1,), slots, device=key.device)

    def period() -> None:
        step.take(None, slots, None)
        for _ in range(max(config.periods)):
            step.begin()
            step.attend(query, key, value, lengths, **SOFTMAX)  # type: ignore[arg-type]
            step.advance()

    def dense() -> None:
        for _ in range(max(config.periods)):
            F.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    return Work(captured(period, device), captured(dense, device))


def case(kind: str, slots: int, config: HiP | None = None, note: str = "") -> Case:
    """``kind``: "prefill"; "decode", a period of steps; or "select", the selection of a prompt alone. ``note``: what is
    special about ``config``."""
    config = config or HiP()
    seen = config.sink + config.budget + config.window
    queries = max(config.periods) if kind == "decode" else slots
    read = queries * 2 * seen if kind == "decode" else 2 * slots
    builders = {"prefill": build_prefill, "decode": build_decode, "select": build_select}
    baselines = {"prefill": "causal SDPA", "decode": "SDPA over all slots", "select": "attention over what is chosen"}
    what = "selection alone" if kind == "select" else f"{kind}, selection included"
    return Case(
        op="hip_select",
        name=f"{what}{note}, {QUERY_HEADS}/{HEADS}/{DIM} S={slots}",
        build=partial(builders[kind], config, slots),
        baseline=baselines[kind],
        moved=2 * DIM * HEADS * read,
        flop=selection_flop(config, slots) if kind == "select" else 4 * DIM * QUERY_HEADS * queries * seen,
    )


def selection_flop(config: HiP, slots: int) -> int:
    """Floating-point operations of the stages of a prompt, without those that estimate levels."""
    total = 0
    for index, (chunk, tokens, stride) in enumerate(config.stages):
        exact = config.last_stage_exact and index + 1 == len(config.stages)
        reads = chunk if exact else 2 * levels(chunk)  # keys of a chunk
        chunks = slots * slots // 2 // chunk if tokens is None else slots * min(tokens, slots) // chunk
        total += 2 * DIM * QUERY_HEADS * chunks * reads // stride
    return total


FOURS = HiP(stages=((256, None, 4), (32, 32768, 4), (8, 8192, 4)))  # what is read for a quarter of the queries
CASES = [case(kind, slots) for kind in ("prefill", "decode", "select") for slots in (32768, 131072)]
CASES.append(case("select", 131072, FOURS, note=", last stage with stride 4"))
