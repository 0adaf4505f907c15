"""The loop over the places of a RULER run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby

from llm_accel.common.progress import Progress
from llm_accel.eval.engine import Engine, Outcome
from llm_accel.eval.grid import duration
from llm_accel.eval.prompt_loop import Configs, Job, base_record, run_batches
from llm_accel.eval.records import Record, RunDir
from llm_accel.eval.tasks.needle.runner import probe
from llm_accel.eval.tasks.ruler.prompts import Place, Prompt, PromptMaker
from llm_accel.eval.tasks.ruler.scoring import score
from llm_accel.eval.tasks.ruler.settings import Settings
from llm_accel.eval.tasks.ruler.tasks import TASKS


class RulerDir(RunDir):
    """Records of a run: one of each method and prompt."""

    fields = ("method", "length", "task", "sample")
    plots = ("tasks.png",)


def places(settings: Settings, shard: tuple[int, int] = (1, 1)) -> list[Place]:
    """All places of a shard, ascending. Shards are disjoint, cover the run and have equal shares of every task."""
    tasks = sorted(settings.tasks)
    every = [
        Place(length, task, sample)
        for length in settings.lengths
        for task in tasks
        for sample in range(settings.samples)
    ]
    index, count = shard
    return every[index - 1 :: count]


def batches(wanted: Iterable[Place], size: int) -> Iterator[list[Place]]:
    """Places of one length and task, at most ``size`` at a time. Lengths are exact, so a batch needs no padding."""
    for _, group in groupby(sorted(wanted), key=lambda place: (place.length, place.task)):
        row = list(group)
        for start in range(0, len(row), size):
            yield row[start : start + size]


def run_places(
    settings: Settings,
    engines: Mapping[int, Engine],
    maker: PromptMaker,
    configs: Configs,
    run_dir: RunDir,
    done: Sequence[Record],
    wanted: Sequence[Place],
    shard: tuple[int, int] = (1, 1),
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
    shown: bool = True,
) -> None:
    """Runs what ``done`` lacks of ``wanted``, every method on the same prompts, and appends to the directory.

    ``engines``: by the number of tokens that a task may generate.
    """

    def engine(place: Place) -> Engine:
        return engines[TASKS[place.task].new_tokens]

    job = Job(
        make=maker.make,
        engine=engine,
        record=partial(make_record, settings, maker, shard),
        key=lambda place: (place.length, place.task, place.sample),
    )
    lacking = job.lacking(wanted, configs, done, run_dir)
    if done:
        say(f"{run_dir.path}: {len(done)} records are there, {sum(map(len, lacking.values()))} to do")
    if not lacking:
        return
    prompts = sum(map(len, lacking.values()))
    tokens = sum((place.length - TASKS[place.task].new_tokens) * len(left) for place, left in lacking.items())
    first = next(iter(lacking))
    speed = probe(engine(first), lambda length: maker.make(Place(length, first.task, 0)), settings.lengths)
    seconds = sum(
        len(left) * speed.seconds(place.length, TASKS[place.task].new_tokens) for place, left in lacking.items()
    )
    say(f"{prompts} prompts, {tokens:,} prompt tokens; at most {duration(seconds)} at the dense model's speed")
    with Progress(tokens, done, "tok", shown, score="score") as progress:
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
        "length": prompt.place.length,
        "task": prompt.place.task,
        "sample": prompt.place.sample,
        "wording": settings.wording,
        "score": score(TASKS[prompt.place.task], base["answer"], prompt.expected),
        "expected": list(prompt.expected),
    }
