"""HiP, selection included: attention of a whole prompt, and decode steps over one period of its refreshes."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.ops.registry import Case, Work, captured
from llm_accel.kernels.block_sparse import block_sparse_attention
from llm_accel.kernels.hip_select import hip_select
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


def case(kind: str, slots: int, config: HiP | None = None) -> Case:
    """``kind``: "prefill", or "decode", a period of steps."""
    config = config or HiP()
    seen = config.sink + config.budget + config.window
    queries = slots if kind == "prefill" else max(config.periods)
    read = 2 * slots if kind == "prefill" else queries * 2 * seen
    return Case(
        op="hip_select",
        name=f"{kind}, selection included, {QUERY_HEADS}/{HEADS}/{DIM} S={slots}",
        build=partial(build_prefill if kind == "prefill" else build_decode, config, slots),
        baseline="causal SDPA" if kind == "prefill" else "SDPA over all slots",
        moved=2 * DIM * HEADS * read,
        flop=4 * DIM * QUERY_HEADS * queries * seen,
    )


CASES = [case(kind, slots) for kind in ("prefill", "decode") for slots in (32768, 131072)]
