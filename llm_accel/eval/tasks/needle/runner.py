"""The loop over a grid: makes prompts, runs every method on them, and writes a record of each at once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial

from llm_accel.common.progress import Progress
from llm_accel.eval.engine import Engine, Outcome, TokenPrompt
from llm_accel.eval.grid import Place, Speed, batches, cost
from llm_accel.eval.prompt_loop import Configs, Job, base_record, run_batches
from llm_accel.eval.records import Record, RunDir
from llm_accel.eval.tasks.needle.prompts import Prompt, PromptMaker
from llm_accel.eval.tasks.needle.scoring import score
from llm_accel.eval.tasks.needle.settings import Settings

_PROBE_LENGTHS = (512, 2048)
_PROBE_SECONDS = 2.0  # a first probe slower than this is not followed by a longer one


def run_grid(
    settings: Settings,
    engine: Engine,
    maker: PromptMaker,
    configs: Configs,
    run_dir: RunDir,
    done: Sequence[Record],
    wanted: Sequence[Place],
    shard: tuple[int, int] = (1, 1),
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
    shown: bool = True,
) -> None:
    """Runs what ``done`` lacks of ``wanted``, every method on the same prompts, and appends to the directory."""
    job: Job[Place, TokenPrompt] = Job(
        make=lambda place: maker.make(place.length, place.depth, place.sample),
        engine=lambda place: engine,
        record=partial(make_record, settings, maker, shard),
        key=lambda place: (place.length, float(place.depth), place.sample),
    )
    lacking = job.lacking(wanted, configs, done, run_dir)
    if done:
        say(f"{run_dir.path}: {len(done)} records are there, {sum(map(len, lacking.values()))} to do")
    if not lacking:
        return
    speed = probe(engine, lambda length: maker.make(length, 50.0, -1), settings.lengths)
    say(str(cost([(place, len(methods)) for place, methods in lacking.items()], engine.max_new_tokens, speed)))
    tokens = sum(place.length * len(methods) for place, methods in lacking.items())
    with Progress(tokens, done, "tok", shown) as progress:
        run_batches(job, batches(lacking, settings.batch_size), lacking, configs, run_dir, progress)


def make_record(
    settings: Settings,
    maker: PromptMaker,
    shard: tuple[int, int],
    method: str,
    prompt: Prompt,
    row: int,
    outcome: Outcome,
) -> Record:
    """The record of one prompt and method."""
    base = base_record(maker, shard, method, prompt, row, outcome)
    return {
        **base,
        "length": prompt.length,
        "depth": prompt.depth,
        "sample": prompt.sample,
        "task": settings.task,
        **score(base["answer"], prompt.values, settings.value_kind),
        "expected": list(prompt.values),
        "needle_tokens": list(prompt.needles),
    }


def probe(engine: Engine, prompt_of: Callable[[int], TokenPrompt], lengths: Sequence[int]) -> Speed:
    """Measures the dense model on one or two short prompts of this run's kind; it warms up the model as well.

    ``prompt_of``: a prompt of a length.
    """
    timed: list[tuple[int, float]] = []
    step = 0.0
    for length in sorted({max(min(n, max(lengths)), min(lengths)) for n in _PROBE_LENGTHS}):
        prompt = prompt_of(length)
        if not timed:
            engine.run([prompt], ())  # the first call also pays for set-up
        outcome = engine.run([prompt], ())
        timed.append((length, outcome.prefill_ms / 1e3))
        step = (outcome.decode_ms or 0.0) / 1e3
        if timed[-1][1] > _PROBE_SECONDS:
            break
    return Speed.fit(timed[0], timed[1] if len(timed) > 1 else None, step)
