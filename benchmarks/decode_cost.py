"""Decode time of every method with a fixed budget after a short and a long prompt: it must not depend on the prompt.

    python -m benchmarks.decode_cost --out benchmarks/results/decode_cost_cpu.json

All caches live in one process. Steps after the short and after the long prompt take turns, methods take turns from
round to round, and medians are reported; ``cost_of_length`` is the long prompt's median over the short one's, and
``of_dense`` the median over the rounds of a method's time over the dense model's. With budgets that nothing exceeds
that is the overhead of the plug-in:

    python -m benchmarks.decode_cost --idle --lengths 512 2048 --rounds 24 --out benchmarks/results/idle_cost_cpu.json
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

import llm_accel
from benchmarks.common import (
    build_model,
    conditions,
    make_prompt,
    p10_p90,
    prefill,
    publish,
    storage_bytes,
    timed_step,
)
from llm_accel.registry import parse

METHODS = (
    "snapkv:budget=512",
    "pyramidkv:budget=512",
    "adakv:budget=512",
    "h2o:budget=512",
    "streaming_llm:budget=512",
    "streaming_llm:budget=512,positions=cache",
    "retrieval_heads:head_list=0.0+1.0+2.0+3.0,full_budget=512",
    "random:budget=512",
)


# with budgets that no prompt here exceeds
IDLE = tuple(f"{name}:budget=65536" for name in ("snapkv", "pyramidkv", "adakv", "h2o", "streaming_llm", "random"))


def applied(model: PreTrainedModel, method: str) -> Any:
    """The model with a method, which may be none."""
    return nullcontext() if method == "dense" else llm_accel.apply(model, parse(method))


def fill(model: PreTrainedModel, method: str, lengths: Sequence[int]) -> dict[int, DynamicCache]:
    """One cache for each prompt length."""
    caches = {}
    with applied(model, method) as handle:
        for length in lengths:
            caches[length] = DynamicCache(config=model.config) if handle is None else handle.new_cache()
            prefill(model, make_prompt(model, length), caches[length])
    return caches


def take_turns(
    model: PreTrainedModel, method: str, caches: dict[int, DynamicCache], steps: int
) -> dict[int, list[float]]:
    """Milliseconds of ``steps`` greedy steps on each cache, the first of which only warms up and is left out."""
    tokens = {length: torch.zeros(1, 1, dtype=torch.long) for length in caches}
    times: dict[int, list[float]] = {length: [] for length in caches}
    with applied(model, method):
        for step in range(steps + 1):
            for length, cache in caches.items():
                tokens[length], milliseconds = timed_step(model, tokens[length], cache)
                if step:
                    times[length].append(milliseconds)
    return times


def main() -> None:
    """Runs everything and prints or writes one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", action="append", help="instead of all of them; repeatable")
    parser.add_argument("--idle", action="store_true", help="with budgets that evict nothing")
    parser.add_argument("--lengths", type=int, nargs=2, default=(2048, 16384), metavar=("SHORT", "LONG"))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8, help="decode steps per round and prompt")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, methods = build_model(args.layers), ("dense", *(args.method or (IDLE if args.idle else METHODS)))
    caches = {method: fill(model, method, args.lengths) for method in methods}
    times: dict[str, dict[int, list[float]]] = {m: {length: [] for length in args.lengths} for m in methods}
    for _ in range(args.rounds):
        for method in methods:
            for length, measured in take_turns(model, method, caches[method], args.steps).items():
                times[method][length] += measured
    short, long = args.lengths
    result: dict[str, Any] = {
        "lengths": [short, long],
        "layers": args.layers,
        "steps": args.steps * args.rounds,
        "conditions": conditions(),
        "methods": {},
    }
    for method in methods:
        medians = {length: statistics.median(measured) for length, measured in times[method].items()}
        result["methods"][method] = {
            "ms_per_token": medians,
            "p10_p90": {length: p10_p90(measured) for length, measured in times[method].items()},
            "of_dense": {
                length: _of_dense(times[method][length], times["dense"][length], args.steps) for length in medians
            },
            "cost_of_length": medians[long] / medians[short],
            "kv_bytes": {length: storage_bytes(cache) for length, cache in caches[method].items()},
        }
    publish(result, args.out)


def _of_dense(times: list[float], dense: list[float], steps: int) -> float:
    """Median over the rounds of one round's median over that of the dense model."""
    starts = range(0, len(times), steps)
    return statistics.median(
        statistics.median(times[i : i + steps]) / statistics.median(dense[i : i + steps]) for i in starts
    )


if __name__ == "__main__":
    main()
