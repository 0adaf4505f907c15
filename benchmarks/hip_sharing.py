"""HiP with queries compared fairly, and what it costs: ``python -m benchmarks.hip_sharing --model smollm2-135m``.

Needles of the built-in haystack (``single``, a word and a 7-digit number) with a quarter of the keys visible in every
layer: 64 sinks, a window of 128, the rest chosen. And the time of the selection alone on random queries and keys, in
seconds of processor time, the shortest of five.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import CPU, publish
from llm_accel.common.arguments import ModelOptions
from llm_accel.common.environment import hardware, versions
from llm_accel.common.loading import load_text_model
from llm_accel.common.statistics import wilson
from llm_accel.eval.engine import TextEngine
from llm_accel.eval.grid import points
from llm_accel.eval.tasks.needle.settings import NeedleSettings, parse_depths
from llm_accel.eval.tasks.needle.task import NeedleMaker
from llm_accel.methods import HiP
from llm_accel.methods.sparse.hip import make_search

HEADS, DIM = 4, 64
WAYS = ("raw", "fair")


def quarter(length: int) -> HiP:
    """A quarter of ``length`` keys visible, no layer left out, no prompt too short."""
    return HiP(sink=64, window=128, budget=length // 4 - 192, edge_layers=(), min_prefill_len=0)


def seconds(config: HiP, length: int, queries: int) -> float:
    """Processor time of one selection for the last ``queries`` of ``length`` tokens, one group of four heads."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, HEADS, queries, DIM, generator=generator)
    key = torch.randn(1, 1, length, DIM, generator=generator)
    search, times = make_search(config, config.budget, few=False), []
    for _ in range(5):
        begin = time.process_time()
        search.select(query, key, None)
        times.append(time.process_time() - begin)
    return min(times)


def cost(length: int, config: HiP) -> dict[str, Any]:
    """Both ways, and their ratio."""
    taken = {way: seconds(replace(config, share_scores=way), length, min(length, 4096)) for way in WAYS}
    return {"length": length, "seconds": taken, "ratio": round(taken["fair"] / taken["raw"], 3)}


def found(engine: TextEngine, tokenizer: Any, length: int, samples: int) -> dict[str, Any]:
    """Needles found, dense and both ways."""
    settings = NeedleSettings(task="single", lengths=(length,), depths=parse_depths("5"), samples=samples, seed=42)
    maker = NeedleMaker.load(settings, tokenizer)
    ways = {"dense": ()} | {way: (replace(quarter(length), share_scores=way),) for way in WAYS}
    hits = dict.fromkeys(ways, 0)
    wanted = points(settings.lengths, settings.depths, samples)
    for point in wanted:
        prompt = maker.make(point)
        for way, configs in ways.items():
            (answer,) = engine.run([prompt], configs).answers
            hits[way] += prompt.expected[0] in maker.encoder.decode(answer)
    ends = {way: [round(end, 3) for end in wilson(count, len(wanted))] for way, count in hits.items()}
    return {"length": length, "prompts": len(wanted), "found": hits, "ci95": ends}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=None)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--samples", type=int, default=1, help="prompts at each of five depths")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    result = {
        "hardware": hardware(CPU),
        "versions": versions(),
        "model": options.model or "bundled",
        "dtype": options.dtype,
        "cost": [cost(4096, quarter(4096)), cost(16384, HiP())],
    }
    model, tokenizer, _ = load_text_model(ModelOptions(model=options.model, dtype=options.dtype, device="cpu"))
    engine = TextEngine(model, tokenizer, query_agnostic=False)
    result["needles"] = [found(engine, tokenizer, length, options.samples) for length in options.lengths]
    publish(result, options.out)


if __name__ == "__main__":
    main()
