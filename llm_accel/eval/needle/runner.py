"""The loop over a grid: makes prompts, runs every method on them, and writes a record of each at once."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

from llm_accel.eval.needle.engine import Engine, Outcome
from llm_accel.eval.needle.grid import Place, Speed, batches, cost
from llm_accel.eval.needle.prompts import Prompt, PromptMaker
from llm_accel.eval.needle.records import Record, RunDir, record_key
from llm_accel.eval.needle.scoring import score
from llm_accel.eval.needle.settings import Settings
from llm_accel.methods import MethodConfig

Configs = Mapping[str, MethodConfig | None]
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
) -> None:
    """Runs what ``done`` lacks of ``wanted``, every method on the same prompts, and appends to the directory."""
    keys = {record_key(record) for record in done}
    lacking = {place: [m for m in configs if (m, *_key(place)) not in keys] for place in wanted}
    todo = [place for place, methods in lacking.items() if methods]
    if done:
        say(f"{run_dir.path}: {len(done)} records are there, {sum(map(len, lacking.values()))} to do")
    if not todo:
        return
    speed = probe(engine, maker, settings)
    say(str(cost([(place, len(lacking[place])) for place in todo], engine.max_new_tokens, speed)))
    with _Progress(sum(place.length * len(lacking[place]) for place in todo), done) as progress:
        for batch in batches(todo, settings.batch_size):
            prompts = [maker.make(place.length, place.depth, place.sample) for place in batch]
            for method, config in configs.items():
                own = [p for p, place in zip(prompts, batch, strict=True) if method in lacking[place]]
                for part in _alike(own, settings.query_agnostic):
                    outcome = engine.run(part, config)
                    records = [
                        make_record(settings, maker, method, prompt, i, outcome, shard) for i, prompt in enumerate(part)
                    ]
                    run_dir.append(records)
                    progress.add(method, records)


def make_record(
    settings: Settings,
    maker: PromptMaker,
    method: str,
    prompt: Prompt,
    row: int,
    outcome: Outcome,
    shard: tuple[int, int],
) -> Record:
    """The record of one prompt and method; times are those of its batch."""
    ids = outcome.answers[row]
    answer = maker.encoder.decode(ids)
    return {
        "method": method,
        "length": prompt.length,
        "depth": prompt.depth,
        "sample": prompt.sample,
        "task": settings.task,
        "query_agnostic": settings.query_agnostic,
        "chat_template": maker.frame.chat,
        **score(answer, prompt.values, settings.value_kind),
        "expected": list(prompt.values),
        "answer": answer,
        "new_tokens": len(ids),
        "kv_bytes": outcome.kv_bytes,
        "dense_kv_bytes": outcome.dense_kv_bytes,
        "prefill_ms": round(outcome.prefill_ms, 3),
        "decode_ms_per_token": None if outcome.decode_ms is None else round(outcome.decode_ms, 3),
        "batch": len(outcome.answers),
        "needle_tokens": list(prompt.needles),
        "prompt_hash": prompt.digest(),
        "seed": settings.seed,
        "shard": f"{shard[0]}/{shard[1]}",
    }


def probe(engine: Engine, maker: PromptMaker, settings: Settings) -> Speed:
    """Measures the dense model on one or two short prompts of this run's kind; it warms up the model as well."""
    longest = max(settings.lengths)
    measured: list[tuple[int, float]] = []
    step = 0.0
    for length in sorted({max(min(n, longest), min(settings.lengths)) for n in _PROBE_LENGTHS}):
        prompt = maker.make(length, 50.0, -1)
        if not measured:
            engine.run([prompt], None)  # the first call also pays for set-up
        outcome = engine.run([prompt], None)
        measured.append((length, outcome.prefill_ms / 1e3))
        step = (outcome.decode_ms or 0.0) / 1e3
        if measured[-1][1] > _PROBE_SECONDS:
            break
    return Speed.fit(measured[0], measured[1] if len(measured) > 1 else None, step)


def _key(place: Place) -> tuple[int, float, int]:
    return place.length, float(place.depth), place.sample


def _alike(prompts: list[Prompt], query_agnostic: bool) -> list[list[Prompt]]:
    """One batch, or for two-step prompts one per context length, so that there is no padding either."""
    if not query_agnostic:
        return [prompts] if prompts else []
    ordered = sorted(prompts, key=lambda prompt: prompt.context_length)
    return [list(group) for _, group in groupby(ordered, key=lambda prompt: prompt.context_length)]


class _Progress:
    """A bar over tokens (they are what takes time) with the running mean of each method."""

    def __init__(self, tokens: int, done: Sequence[Record]) -> None:
        tqdm: Any = importlib.import_module("tqdm").tqdm
        self._scores: dict[str, list[float]] = {}
        for record in done:
            self._scores.setdefault(record["method"], []).append(record["exact"])
        self._bar: Any = tqdm(
            total=tokens,
            unit="tok",
            unit_scale=True,
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 20.0,
        )
        self._shown = 0.0

    def add(self, method: str, records: Sequence[Record]) -> None:
        """Counts the records of a batch."""
        self._scores.setdefault(method, []).extend(record["exact"] for record in records)
        if time.monotonic() - self._shown > 0.5:
            short = [name.partition(":")[0] for name in self._scores]
            names = short if len(set(short)) == len(short) else list(self._scores)
            means = [f"{name} {sum(s) / len(s):.2f}" for name, s in zip(names, self._scores.values(), strict=True)]
            self._bar.set_postfix_str(", ".join(means), refresh=False)
            self._shown = time.monotonic()
        self._bar.update(sum(record["length"] for record in records))

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()
