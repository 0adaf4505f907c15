"""The summary as a text table."""

from __future__ import annotations

from typing import Any

from llm_accel.eval.table import NONE, by_length, missing
from llm_accel.eval.tasks.needle.settings import Settings


def title(settings: Settings, model: str) -> str:
    """One line that says what was run: model, task, kinds and whether the question was seen during compression."""
    needles = f"{settings.needles} needle{'s' if settings.needles > 1 else ''}"
    if settings.distractors:
        needles += f" + {settings.distractors} distractors"
    aware = "query-agnostic (question after compression)" if settings.query_agnostic else "query-aware"
    return f"needle: {model}, {settings.task}, {needles}, {settings.key_kind} -> {settings.value_kind}, {aware}"


def render(settings: Settings, summary: dict[str, Any], model: str) -> str:
    """Exact match per length with 95 % Wilson intervals below, mean, difference to dense, memory and speed."""
    methods: dict[str, Any] = summary["methods"]
    table = by_length(
        "exact match",
        methods,
        settings.lengths,
        "exact",
        {"ROUGE-1 recall": "rouge1_recall"},
        below=("95 % interval", "ci95"),
    )
    counts = sorted({column["n"] for m in methods.values() for column in m["lengths"].values()})
    n = NONE if not counts else str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return "\n".join([title(settings, model), *table, f"samples per length: {n}{missing(summary)}"])
