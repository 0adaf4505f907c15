"""End-to-end runs of ``llm-accel bench`` on one GPU: what is run, and how long it will take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from benchmarks.ops.registry import FLOP_PER_SECOND
from llm_accel import cli
from llm_accel.eval.cost import ModelCost
from llm_accel.eval.tasks.bench.settings import BenchSettings
from llm_accel.eval.tasks.bench.shapes import build, shape_config

SHAPE = ("--shape", "llama-3.1-8b", "--new-tokens", "64", "--no-plot")
METHODS = ("snapkv", "h2o", "streaming_llm", "adakv")
STARTUP, COMPILING, EAGER_STEP = 40.0, 45.0, 0.03  # seconds: a process with its weights, one graph, one step


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: what the result calls it.
        module: what runs, as in ``python -m``.
        arguments: its command line, the output folder left out.
        seconds: how long it takes on a large GPU, roughly.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    seconds: float


def steps() -> list[Step]:
    """Everything that is measured end to end, cheapest first."""
    methods = [part for name in METHODS for part in ("--method", f"{name}:budget=2048")]
    snapkv, compiled = methods[:2], ("--decode", "compiled")
    benches = {
        "largest batch at 32k in 80 GB": ("--lengths", "32k", "--memory-limit", "80GB", "--rounds", "1", *snapkv),
        "16k": ("--lengths", "16k", "--rounds", "3", *compiled, *snapkv),
        "16k, all methods": ("--lengths", "16k", "--rounds", "3", *compiled, *methods),
        "128k": ("--lengths", "128k", "--rounds", "1", *compiled, *snapkv),
        "128k, HiP": ("--lengths", "128k", "--rounds", "1", *compiled, "--method", "hip"),
        "batch 8 at 64k, half of the layers": (
            *("--lengths", "64k", "--batch", "8", "--rounds", "1", *compiled, *snapkv),
            *("--set", "num_hidden_layers=16"),
        ),
        "batch 8 at 64k": ("--lengths", "64k", "--batch", "8", "--rounds", "1", *compiled, *snapkv),
    }
    found = [
        Step(name, "llm_accel", ("bench", *SHAPE, *arguments), estimate(bench_settings((*SHAPE, *arguments))))
        for name, arguments in benches.items()
    ]
    found.append(Step("trace", "benchmarks.trace", (), STARTUP + COMPILING))
    return sorted(found, key=lambda step: step.seconds)


def bench_settings(arguments: Sequence[str]) -> BenchSettings:
    """What ``llm-accel bench`` makes of a command line."""
    return BenchSettings.from_arguments(cli.parse(["bench", *arguments])[1])


def estimate(settings: BenchSettings) -> float:
    """Seconds that a benchmark takes on a large GPU, roughly: prompts at three quarters of its best rate."""
    assert settings.shape is not None
    work = _work(settings.shape, settings.changes)
    compiled = sum(candidate.decode == "compiled" for candidate in settings.candidates)
    calls = len(settings.candidates) * (1 + settings.rounds) + compiled
    flop = sum(work.prompt_flop(length, batch) for length in settings.lengths for batch in settings.batches)
    cells = len(settings.lengths) * len(settings.batches)
    decoding = cells * len(settings.candidates) * settings.rounds * settings.new_tokens * EAGER_STEP
    return STARTUP + compiled * COMPILING + calls * flop / (0.75 * FLOP_PER_SECOND) + decoding


@cache
def _work(shape: str, changes: tuple[str, ...]) -> ModelCost:
    return ModelCost.of(build(shape_config(shape, changes), torch.bfloat16, torch.device("meta"), None, 0))
