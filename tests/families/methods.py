"""The methods that the sweep applies to every family, with budgets below and above its prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from llm_accel import H2O, AdaKV, Dense, HiP, PyramidKV, RandomKV, RetrievalHeads, SnapKV, StreamingLLM
from llm_accel.methods import MethodConfig
from llm_accel.methods.sparse import hip

BUDGET = 24
ABOVE = 512
SINKS, RECENT = 3, 12

BELOW: dict[str, Callable[[], MethodConfig]] = {
    "snapkv": lambda: SnapKV(budget=BUDGET, window=8),
    "h2o": lambda: H2O(budget=BUDGET),
    "streaming_llm": lambda: StreamingLLM(budget=BUDGET),
    "adakv": lambda: AdaKV(budget=BUDGET, window=8, page=8),
    "pyramidkv": lambda: PyramidKV(budget=BUDGET, window=8, beta=2, kernel=5),
    "random": lambda: RandomKV(budget=BUDGET, window=8),
}
WHOLE: dict[str, Callable[[], MethodConfig]] = {
    "snapkv": lambda: SnapKV(budget=ABOVE),
    "h2o": lambda: H2O(budget=ABOVE),
    "streaming_llm": lambda: StreamingLLM(budget=ABOVE),
    "adakv": lambda: AdaKV(budget=ABOVE),
    "pyramidkv": lambda: PyramidKV(budget=ABOVE),
    "random": lambda: RandomKV(budget=ABOVE),
    "retrieval_heads": lambda: RetrievalHeads(full=1.0, sinks=SINKS, recent=RECENT),
    "hip": lambda: HiP(
        sink=8,
        window=17,
        budget=256,
        edge_layers=(),
        stages=((16, None, 2), (8, 256, 1)),
        block_q=16,
        refresh=(4, 2),
        min_prefill_len=0,
    ),
    "dense": lambda: Dense(),
}
METHODS = (*BELOW, "retrieval_heads", "hip", "dense")


def split_heads(kv_heads: Mapping[int, int], prefill: Literal["dense", "lambda"]) -> RetrievalHeads:
    """Every second head of these caches, layer -> KV heads, keeps everything."""
    heads = [f"{layer}.{head}" for layer, count in kv_heads.items() for head in range(count) if (layer + head) % 2]
    return RetrievalHeads(head_list=tuple(heads), sinks=SINKS, recent=RECENT, prefill=prefill)


@contextmanager
def sparse_at_any_length() -> Iterator[None]:
    """HiP computes sparsely although its budget covers everything, which it would leave to dense attention."""
    before: Any = hip.reach
    hip.reach = lambda search: 0
    try:
        yield
    finally:
        hip.reach = before
