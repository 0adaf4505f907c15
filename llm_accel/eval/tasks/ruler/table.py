"""The summary as text tables."""

from __future__ import annotations

from typing import Any

from llm_accel.eval.lengths import length_label
from llm_accel.eval.table import aligned, by_length, missing, number
from llm_accel.eval.tasks.ruler.settings import Settings
from llm_accel.eval.tasks.ruler.tasks import TASKS


def title(settings: Settings, model: str) -> str:
    """One line that says what was run: model, tasks, haystack, and whether compression saw the question."""
    aware = "query-agnostic (question after compression)" if settings.query_agnostic else "query-aware"
    prose = "built-in sentences" if settings.haystack == "grammar" else settings.haystack
    wording = "" if settings.wording == "ruler" else f", {settings.wording} model's wording"
    return f"RULER: {model}, {len(settings.tasks)} of {len(TASKS)} tasks, prose: {prose}{wording}, {aware}"


def render(settings: Settings, summary: dict[str, Any], model: str) -> str:
    """Score per length with cost, then per task at each length; tasks that say nothing are named below."""
    methods: dict[str, Any] = summary["methods"]
    lengths = [n for n in settings.lengths if any(str(n) in entry["lengths"] for entry in methods.values())]
    blocks = [title(settings, model), "\n".join(by_length("score", methods, lengths, "score"))]
    blocks += [_by_task(settings, methods, n) for n in lengths]
    void = [f"{length_label(int(n))}: {', '.join(tasks)}" for n, tasks in summary["void"].items() if tasks]
    if void:
        blocks.append(f"void, dense answers less than half of them: {'; '.join(void)}")
    blocks.append(f"samples per task and length: {settings.samples}{missing(summary)}")
    return "\n\n".join(blocks)


def _by_task(settings: Settings, methods: dict[str, Any], length: int) -> str:
    rows = [[length_label(length), *(task.removeprefix("niah_") for task in settings.tasks)]]
    for name, entry in methods.items():
        scores = entry["lengths"].get(str(length), {"tasks": {}})["tasks"]
        rows.append([name, *(number(scores.get(task)) for task in settings.tasks)])
    return "\n".join(aligned(rows))
