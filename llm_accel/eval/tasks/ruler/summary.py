"""Records to the summary: RULER's score per method, length and task, with memory and time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from llm_accel.eval.records import Record
from llm_accel.eval.summary import DENSE, by_method, mean_of, progress_of
from llm_accel.eval.tasks.ruler.settings import Settings

VOID = 0.5  # a task that the dense model solves less than half of says nothing about a method


def summarize(settings: Settings, records: Sequence[Record], wanted: int, **about: Any) -> dict[str, Any]:
    """The summary as plain data.

    ``methods[spec]`` has ``score`` (mean over tasks, then lengths: each task weighs the same), ``vs_dense`` (the same
    minus dense), and ``lengths[length]`` with ``n``, ``score``, ``tasks[task]`` (mean) and cost per prompt.
    ``void[length]`` names tasks on which dense stays below one half.
    """
    methods = by_method(settings.methods, settings.lengths, records, partial(_column, settings.tasks), ("score",))
    dense = methods.get(DENSE, {"lengths": {}})["lengths"]
    return {
        **about,
        "query_agnostic": settings.query_agnostic,
        "wording": settings.wording,
        "haystack": settings.haystack,
        "tasks": list(settings.tasks),
        **progress_of(records, wanted),
        "void": {n: [t for t, score in column["tasks"].items() if score < VOID] for n, column in dense.items()},
        "methods": methods,
    }


def _column(tasks: Sequence[str], records: Sequence[Record]) -> dict[str, Any]:
    means = {task: mean_of([r["score"] for r in records if r["task"] == task]) for task in tasks}
    scores = {task: score for task, score in means.items() if score is not None}
    return {"score": mean_of(list(scores.values())), "tasks": scores}
