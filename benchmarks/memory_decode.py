"""Memory and decode time of a long prompt on a mid-size random-weight model, dense against a method.

    python -m benchmarks.memory_decode --method snapkv:budget=512 --out benchmarks/results/memory_decode_cpu.json

Each prefill runs in a process of its own, so that its peak resident memory is its own. ``activations`` is the same
prompt without a cache: what the prompt costs whatever is cached. Decode times are interleaved and reported as medians.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

import llm_accel
from benchmarks.common import (
    MIB,
    TOKEN_BYTES,
    build_model,
    conditions,
    make_prompt,
    p10_p90,
    prefill,
    prefill_peak,
    publish,
    storage_bytes,
    timed_step,
)
from llm_accel.eval.cost import ModelCost
from llm_accel.registry import parse


def decode_times(model: PreTrainedModel, cache: DynamicCache, steps: int) -> list[float]:
    """Milliseconds of each of ``steps`` greedy decode steps."""
    token, times = torch.zeros(1, 1, dtype=torch.long), []
    for _ in range(steps):
        token, milliseconds = timed_step(model, token, cache)
        times.append(milliseconds)
    return times


def compare_decode(method: str, length: int, layers: int, steps: int, rounds: int) -> dict[str, Any]:
    """Median decode time of the dense model and of the method, measured in turns on the same prompt."""
    model = build_model(layers)
    ids = make_prompt(model, length)
    dense_cache = DynamicCache(config=model.config)
    prefill(model, ids, dense_cache)
    handle = llm_accel.apply(model, parse(method))
    cache = handle.new_cache()
    prefill(model, ids, cache)
    kept = [int(layer.physical_length) for layer in handle.report().layers]
    formula = sum(TOKEN_BYTES * entries for entries in kept)
    held, dense_bytes = storage_bytes(cache), storage_bytes(dense_cache)
    times: dict[str, list[float]] = {"dense": [], "method": []}
    for _ in range(rounds):
        with handle.disabled():
            times["dense"] += decode_times(model, dense_cache, steps)[1:]
        times["method"] += decode_times(model, cache, steps)[1:]
    weights = ModelCost.of(model).step_bytes
    bound = (weights + dense_bytes) / (weights + held)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "entries_kept": kept,
        "kv_bytes_held": held,
        "kv_bytes_formula": formula,
        "dense_kv_bytes": dense_bytes,
        "weight_bytes_per_step": weights,
        "decode_ms": medians,
        "decode_ms_p10_p90": {name: p10_p90(values) for name, values in times.items()},
        "speedup": medians["dense"] / medians["method"],
        "bound": bound,
        "share_of_bound": medians["dense"] / medians["method"] / bound,
    }


def main() -> None:
    """Runs everything and prints or writes one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="snapkv:budget=512")
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=16, help="decode steps per round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = {
        "method": args.method,
        "length": args.length,
        "layers": args.layers,
        "conditions": conditions(),
        "prefill": {},
    }
    for mode in ("activations", "dense", args.method):
        result["prefill"][mode] = prefill_peak(mode, args.length, args.layers)
    layer_kv = TOKEN_BYTES * args.length / MIB
    growth = result["prefill"][args.method]["peak_mib"] - result["prefill"]["activations"]["peak_mib"]
    result["peak_growth_mib"] = {"measured": growth, "allowed": layer_kv + 64, "one_layer_kv": layer_kv}
    result["decode"] = compare_decode(args.method, args.length, args.layers, args.steps, args.rounds)
    publish(result, args.out)


if __name__ == "__main__":
    main()
