"""2,000 tokens under every method that keeps its size while decoding: entries, storage and process memory at each step.

    python -m benchmarks.long_generation --out benchmarks/results/long_generation_cpu.json

Entries and bytes of storage are read from the layers after every step. Process memory is sampled every ``--sample``
steps after a warm-up of a fifth of the run: resident memory from ``/proc/self/status``, and what Python itself
allocated from ``tracemalloc``, tensors not included. Drift is the last sample less the first.
"""

from __future__ import annotations

import argparse
import gc
import tracemalloc
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import llm_accel
from benchmarks.common import (
    TOKEN_BYTES,
    build_model,
    conditions,
    make_prompt,
    publish,
    resident_mib,
    storage_bytes,
    timed_step,
)
from llm_accel import RetrievalHeads
from llm_accel.methods import Depth, ScoreAndKeep, StepEviction
from llm_accel.patches.cache_name import CACHE
from llm_accel.registry import parse

METHODS = (
    "h2o:budget=128",
    "streaming_llm:budget=128",
    "streaming_llm:budget=128,positions=cache",
    "retrieval_heads:full=0.0,sinks=4,recent=124",
    "snapkv:budget=128,recompress_every=50",
    "adakv:budget=128,recompress_every=50",
    "pyramidkv:budget=128,recompress_every=50",
)


def caps(method: str, layers: int) -> list[int]:
    """Entries per KV head that each layer may hold after a step."""
    config = parse(method)
    if isinstance(config, RetrievalHeads):
        return [config.sinks + config.recent] * layers
    assert isinstance(config, ScoreAndKeep)
    more = config.vacancies if isinstance(config, StepEviction) else (config.cuts_every or 0) - 1
    return [config.layer_entries(10**9, Depth(layer, layers, later=True)) + more for layer in range(layers)]


@torch.inference_mode()
def generate(model: PreTrainedModel, method: str, prompt: int, steps: int, sample: int) -> dict[str, Any]:
    """Greedy decoding of ``steps`` tokens: what the cache and the process hold meanwhile."""
    limits = caps(method, model.config.num_hidden_layers)
    over, stored, held, resident, traced = 0, [0] * len(limits), [], [], []
    with llm_accel.apply(model, parse(method)) as handle:
        cache = handle.new_cache()
        token = model(make_prompt(model, prompt), **{CACHE: cache}, logits_to_keep=1).logits.argmax(-1)
        tracemalloc.start()
        for step in range(1, steps + 1):
            token, _ = timed_step(model, token, cache)
            layers = handle.report().layers
            lengths = [layer.logical_length - layer.evicted for layer in layers]
            over += any(length > limit for length, limit in zip(lengths, limits, strict=True))
            stored = [max(pair) for pair in zip(stored, lengths, strict=True)]
            held.append(storage_bytes(cache))
            if step >= steps // 5 and step % sample == 0:
                gc.collect()
                resident.append(1024 * resident_mib())
                traced.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    settled = held[steps // 5 :]
    return {
        "caps": limits,
        "most_entries": stored,
        "steps_over_cap": over,
        "storage_bytes": {"least": min(settled), "most": max(settled), "last_half_most": max(held[steps // 2 :])},
        "resident_drift_kib": resident[-1] - resident[0],
        "traced_drift_kib": (traced[-1] - traced[0]) / 1024,
        "dense_growth_kib": (len(resident) - 1) * sample * TOKEN_BYTES * len(limits) / 1024,
    }


def main() -> None:
    """Runs everything and prints or writes one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", action="append", help="instead of all of them; repeatable")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--sample", type=int, default=100)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model = build_model(args.layers)
    result: dict[str, Any] = {
        "prompt": args.prompt,
        "steps": args.steps,
        "layers": args.layers,
        "conditions": conditions(),
        "methods": {
            method: generate(model, method, args.prompt, args.steps, args.sample) for method in args.method or METHODS
        },
    }
    publish(result, args.out)


if __name__ == "__main__":
    main()
