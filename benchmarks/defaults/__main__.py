"""Which pooling SnapKV should have: ``python -m benchmarks.defaults [--model smollm2-135m ...]``.

The rule, fixed before measuring. A candidate's score is the mean, over kinds of prompts and shares kept of 1/16, 1/8,
1/4 and 1/2, of the share of prompts whose dense answer it still gives. On the prompts of the half "choose" the
candidate with the highest score wins; one of a fixed width wins over ``auto`` where they are within 0.01. Its figures
are then taken from the half "confirm", whose wordings, keys and values nobody chose anything by.

Prompts whose dense answer lacks the value do not count. Records are appended to ``--out``, so that a run goes on where
it stopped and several models and lengths come together; ``--publish FILE`` writes what all records there say.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import publish
from benchmarks.defaults.measure import Prober
from benchmarks.defaults.prompts import FAMILIES, Half, make_case
from benchmarks.defaults.summary import summarize
from llm_accel.common.arguments import ModelOptions
from llm_accel.common.environment import hardware, versions
from llm_accel.common.loading import load_text_model
from llm_accel.eval.prompts.encoding import Encoder, make_frame
from llm_accel.methods import AdaKV, PromptCompression, PyramidKV, SnapKV

RATIOS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
HALVES: tuple[Half, ...] = ("choose", "confirm")
KERNELS = (7, 15, 31, 63)


def candidates(ratio: float) -> list[PromptCompression]:
    """What is compared at one share kept: the default first, then fixed widths, and methods that divide the budget."""
    fixed = [SnapKV(ratio=ratio, kernel=kernel) for kernel in KERNELS]
    return [SnapKV(ratio=ratio), *fixed, AdaKV(ratio=ratio), AdaKV(ratio=ratio, kernel=7), PyramidKV(ratio=ratio)]


def fits(setting: PromptCompression, length: int) -> bool:
    """Whether the share kept holds more than what is always kept."""
    return setting.entries(length) > setting.reserved


def records_of(options: argparse.Namespace, done: set[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """A record for each prompt that is not done yet."""
    given = ModelOptions(model=options.model, dtype=options.dtype, device="cpu")
    model, tokenizer, _ = load_text_model(given)
    prober, encoder = Prober(model, tokenizer), Encoder(tokenizer)
    frame = make_frame(encoder, None)
    settings = [setting for ratio in RATIOS for setting in candidates(ratio)]
    for length in options.lengths:
        some = [setting for setting in settings if fits(setting, length)]
        for sample in range(options.samples):
            for half in options.halves:
                for family in FAMILIES[half]:
                    key = (options.model or "bundled", options.dtype, half, family.name, length, sample)
                    if key in done:
                        continue
                    case = make_case(half, family, length, sample, encoder, frame)
                    answer = prober.dense_answer(case)
                    right = None if answer is None else prober.verdicts(answer, some)
                    kept = None if right is None else {s.spec(): ok for s, ok in zip(some, right, strict=True)}
                    yield dict(zip(FIELDS, key, strict=True)) | {"right": kept}


FIELDS = ("model", "dtype", "half", "family", "length", "sample")


def read(path: Path) -> list[dict[str, Any]]:
    """Records so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what is lacking, then publishes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.defaults", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: the bundled needle model", default=None)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--samples", type=int, default=10, help="prompts of each kind")
    parser.add_argument("--halves", nargs="+", choices=HALVES, default=list(HALVES))
    parser.add_argument("--out", type=Path, default=Path("runs/defaults"))
    parser.add_argument("--publish", type=Path)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "cells.jsonl"
    done = {tuple(record[name] for name in FIELDS) for record in read(file)}
    with file.open("a") as cells:
        for record in records_of(options, done):
            print(json.dumps(record), file=cells, flush=True)
    summary = {"hardware": hardware(torch.device("cpu")), "versions": versions(), **summarize(read(file))}
    publish(summary, options.publish)


if __name__ == "__main__":
    main()
