"""From records to the summary: correct answers, hallucinated objects and cost, per method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, cast

import numpy as np

from llm_accel.common.statistics import Floats, bootstrap, share_of_sums, wilson
from llm_accel.eval.records import Record
from llm_accel.eval.summary import mean_of, progress_of
from llm_accel.eval.tasks.vision.questions import POPE_SPLITS
from llm_accel.eval.tasks.vision.scoring import pope_scores, ratio
from llm_accel.eval.tasks.vision.settings import VisionSettings

DENSE, BLIND = "dense", "blind"
Ends = list[float | None] | None
_COSTS = ("patch_recall", "visual_before", "visual_after", "visual_per_layer", "flops")


def summarize(settings: VisionSettings, records: Sequence[Record], wanted: int, **about: Any) -> dict[str, Any]:
    """The summary as plain data. Intervals are of 95 %: Wilson's for shares of questions, else over images drawn with
    replacement.

    ``methods[spec]`` has the mean over tasks of ``exact`` and its ``exact_ci95``, ``tasks[task]`` with ``n``,
    ``exact``, ``ci95`` and ``vs_dense`` (paired with dense over the same images, ``vs_dense_ci95``), ``pope[split]``,
    ``chair``, and means of what a prompt costs; ``prefill_ms`` is a median, ``flops_vs_dense`` a ratio of means.
    """
    by_method = {method: [r for r in records if r["method"] == method] for method in settings.methods}
    dense = {(r["sample"], r["task"], r["number"]): r["exact"] for r in by_method.get(DENSE, [])}
    methods = {method: _entry(own, dense, method, settings.seed) for method, own in by_method.items()}
    base = methods.get(DENSE, {}).get("flops")
    for entry in methods.values():
        entry["flops_vs_dense"] = _rounded(entry["flops"] / base) if base and entry["flops"] else None
    return {
        **about,
        "data": settings.data,
        "split": settings.split,
        "samples": len({record["sample"] for record in records}),
        **progress_of(records, wanted),
        "methods": methods,
    }


def _entry(own: Sequence[Record], dense: dict[Any, float], method: str, seed: int) -> dict[str, Any]:
    tasks = {
        task: _task([r for r in own if r["task"] == task], dense, method, seed)
        for task in dict.fromkeys(record["task"] for record in own)
    }
    yes_no = [record for record in own if record["task"] == "existence"]
    splits = sorted({r["split"] for r in yes_no}, key=lambda s: POPE_SPLITS.index(s) if s in POPE_SPLITS else -1)
    captions = [record for record in own if record["task"] == "caption"]

    def by_task(record: Record) -> tuple[float, ...]:
        here = [float(record["task"] == task) for task in tasks]
        return *(record["exact"] * one for one in here), *here

    costs = {name: mean_of([r[name] for r in own]) for name in _COSTS}
    return {
        "n": len(own),
        "exact": mean_of([task["exact"] for task in tasks.values()]),
        "exact_ci95": _interval(own, by_task, _mean_share, seed),
        "tasks": tasks,
        "pope": {split: _pope([r for r in yes_no if r["split"] == split], seed) for split in splits},
        "chair": _chair(captions, seed) if captions else None,
        **costs,
        "patch_recall_ci95": _interval(
            own, lambda r: (r["patch_recall"] or 0.0, float(r["patch_recall"] is not None)), share_of_sums, seed
        ),
        "prefill_ms": _rounded(median(r["prefill_ms"] for r in own)) if own else None,
    }


def _mean_share(sums: Floats) -> Floats:
    """Hits of each task and questions of each, [n, 2 k], to the mean over tasks, [n]."""
    hits, asked = np.split(sums, 2, axis=1)
    return cast(Floats, (hits / asked).mean(1))


def _task(own: Sequence[Record], dense: dict[Any, float], method: str, seed: int) -> dict[str, Any]:
    hits = sum(record["exact"] for record in own)
    found: dict[str, Any] = {
        "n": len(own),
        "exact": _rounded(hits / len(own)),
        "ci95": [_rounded(end) for end in wilson(hits, len(own))],
        "vs_dense": None,
        "vs_dense_ci95": None,
    }
    shared = [r for r in own if (r["sample"], r["task"], r["number"]) in dense]
    if method != DENSE and shared:
        gain = [r["exact"] - dense[r["sample"], r["task"], r["number"]] for r in shared]
        pairs = {id(r): g for r, g in zip(shared, gain, strict=True)}
        found["vs_dense"] = mean_of(gain)
        found["vs_dense_ci95"] = _interval(shared, lambda r: (pairs[id(r)], 1.0), share_of_sums, seed)
    return found


def _pope(own: Sequence[Record], seed: int) -> dict[str, Any]:
    scores = pope_scores([(record["said"], record["expected"]) for record in own])
    rates = {name: _rounded(scores[name]) for name in ("accuracy", "precision", "recall", "f1", "yes_ratio")}

    def f1_parts(record: Record) -> tuple[float, float]:
        yes = record["said"] == "yes", record["expected"] == "yes"
        return 2.0 * all(yes), float(sum(yes))

    return {
        "n": scores["n"],
        **rates,
        "neither": scores["neither"],
        "accuracy_ci95": [_rounded(end) for end in wilson(scores["correct"], scores["n"])],
        "f1_ci95": _interval(own, f1_parts, share_of_sums, seed),
    }


def _chair(own: Sequence[Record], seed: int) -> dict[str, Any]:
    def over(part: str, whole: str) -> tuple[float | None, Ends]:
        sums = sum(_size(r[part]) for r in own), sum(_size(r[whole]) for r in own)
        return _rounded(ratio(*sums)), _interval(own, lambda r: (_size(r[part]), _size(r[whole])), share_of_sums, seed)

    chair_i, chair_i_ci95 = over("invented", "named")
    recall, recall_ci95 = over("found", "there")
    mentions = sum(len(record["named"]) for record in own)
    hallucinated = sum(bool(record["invented"]) for record in own)
    return {
        "n": len(own),
        "chair_i": chair_i,
        "chair_i_ci95": chair_i_ci95,
        "chair_s": _rounded(hallucinated / len(own)),
        "chair_s_ci95": [_rounded(end) for end in wilson(hallucinated, len(own))],
        "recall": recall,
        "recall_ci95": recall_ci95,
        "words": mean_of([record["words"] for record in own]),
        "repeated": _rounded(ratio(sum(len(r["named"]) - len(set(r["named"])) for r in own), mentions)),
        "mentions": mean_of([len(record["named"]) for record in own]),
        "exact": mean_of([record["exact"] for record in own]),
    }


def _size(value: Any) -> float:
    return float(len(value) if isinstance(value, list) else value)


def _interval(
    own: Sequence[Record],
    adds: Callable[[Record], tuple[float, ...]],
    statistic: Callable[[Floats], Floats],
    seed: int,
) -> Ends:
    """Bootstrap over images; ``adds``: what a record adds to the sums of its image."""
    images: dict[int, list[float]] = {}
    for record in own:
        added = adds(record)
        images[record["sample"]] = [
            a + b for a, b in zip(images.get(record["sample"], [0.0] * len(added)), added, strict=True)
        ]
    ends = bootstrap(list(images.values()), statistic, seed)
    return None if ends is None else [_rounded(end) for end in ends]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
