"""Runs all cells: candidates are interleaved within each round, so that a drift of the machine affects all equally."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from llm_accel.eval.cost import ModelCost
from llm_accel.eval.tasks.bench.bounds import Bounds
from llm_accel.eval.tasks.bench.candidates import CandidateRunner, TimedCall, make_inputs
from llm_accel.eval.tasks.bench.memory import PeakMemory
from llm_accel.eval.tasks.bench.settings import BenchSettings
from llm_accel.eval.tasks.bench.summary import summarize_cell

Log = Callable[[str], None]


def run_cells(
    settings: BenchSettings, model: Any, bounds: Bounds, log: Log
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """One record per length, batch and candidate, in this order; and what there was no memory for, with the message.
    The dense model must fit: everything is compared with it."""
    work, failed = ModelCost.of(model), dict[str, str]()
    runners = [CandidateRunner(model, candidate) for candidate in settings.candidates]
    cells = []
    for length in settings.lengths:
        for batch in settings.batches:
            inputs = make_inputs(model, length, batch, settings.seed)
            place = f"length {length}, batch {batch}"
            log(f"{place}: warming up, measuring memory")
            peaks: dict[int, PeakMemory | None] = {}
            for index, runner in enumerate(runners):
                with skipped_without_memory(failed, f"{runner.candidate.name}, {place}", index > 0, log):
                    peaks[index] = runner.warm_up(inputs, settings.new_tokens, work.weight_bytes)
            runs: list[list[TimedCall]] = [[] for _ in runners]
            for turn in range(settings.rounds):
                log(f"{place}: round {turn + 1} of {settings.rounds}")
                for rank in range(len(runners)):
                    index = (rank + turn) % len(runners)  # so that no candidate always runs after the same one
                    name = f"{runners[index].candidate.name}, {place}"
                    if name not in failed:
                        with skipped_without_memory(failed, name, index > 0, log):
                            runs[index].append(runners[index].run(inputs, settings.new_tokens))
            for index, (runner, own) in enumerate(zip(runners, runs, strict=True)):
                if f"{runner.candidate.name}, {place}" in failed:
                    continue
                rest = (own, runs[0], peaks[index], work, bounds)
                cell = summarize_cell(settings, runner.candidate, (length, batch), *rest)
                if settings.probe:
                    cell["largest_batch"]["probed"] = probe(settings, runner, length, cell, work)
                cells.append(cell)
    return cells, failed


@contextmanager
def skipped_without_memory(failed: dict[str, str], name: str, allowed: bool, log: Log) -> Iterator[None]:
    """Notes in ``failed`` that the device has too little memory for this, so that the others go on."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        if not allowed:
            raise
        failed[name] = str(error).splitlines()[0]
        log(f"{name}: {failed[name]}")
        gc.collect()
        torch.cuda.empty_cache()


def probe(
    settings: BenchSettings, runner: CandidateRunner, length: int, cell: dict[str, Any], work: ModelCost
) -> int | None:
    """The largest batch whose prompt and first tokens stay within the memory limit, tried out by doubling and halving
    from the arithmetic; None where no peak can be measured."""
    guess = cell["largest_batch"]["at_once"]
    if guess is None or settings.memory_limit is None:
        return None
    limit = settings.memory_limit

    def fits(batch: int) -> bool:
        inputs = make_inputs(runner.model, length, batch, settings.seed)
        try:
            peak: PeakMemory | None = runner.measure_memory(inputs, settings.new_tokens, work.weight_bytes)
        except torch.OutOfMemoryError:
            return False
        return peak is not None and max(peak.prefill, peak.decode) <= limit

    return largest_fitting(fits, max(1, guess))


def largest_fitting(fits: Callable[[int], bool], guess: int) -> int:
    """The largest count that fits, found from a guess; counts below one that fits are assumed to fit."""
    low, high = 0, guess
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
