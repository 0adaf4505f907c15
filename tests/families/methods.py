"""The methods that the sweep applies to every family: all that are known by name and run on text models, with budgets
below its prompts as in :mod:`tests.contracts.matrix`, and above them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

from llm_accel import HiP, RetrievalHeads, list_methods
from llm_accel.methods import MethodConfig, ScoreAndKeep
from llm_accel.methods.sparse import hip
from tests.contracts import matrix

ABOVE = 512
SINKS, RECENT = 3, 12

# methods without a budget, or whose options decide whether they act on prompts as short as these
OWN: dict[str, MethodConfig] = {
    "retrieval_heads": RetrievalHeads(full=1.0, sinks=SINKS, recent=RECENT),
    "hip": HiP(
        sink=8,
        window=17,
        budget=256,
        edge_layers=(),
        stages=((16, None, 2), (8, 256, 1)),
        block_q=16,
        refresh=(4, 2),
        min_prefill_len=0,
    ),
}


def _whole(kind: type[MethodConfig]) -> MethodConfig:
    """A method that keeps all of the prompts: by a budget above them where it decides which KV entries stay."""
    return kind(budget=ABOVE) if issubclass(kind, ScoreAndKeep) else OWN.get(kind.name) or kind()


BELOW: Mapping[str, Callable[[], MethodConfig]] = matrix.METHODS
WHOLE: dict[str, Callable[[], MethodConfig]] = {
    name: partial(_whole, kind)
    for name, kind in list_methods().items()
    if "text" in kind.info.kinds and name not in matrix.CHOOSING  # what they choose is among the others
}
METHODS = tuple(WHOLE)


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
