"""The summary as text tables."""

from __future__ import annotations

from typing import Any

from llm_accel.eval.table import aligned, number, size
from llm_accel.eval.tasks.needle.settings import length_label
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
    blocks = [title(settings, model), _by_length(methods, lengths)]
    blocks += [_by_task(settings, methods, n) for n in lengths]
    void = [f"{length_label(int(n))}: {', '.join(tasks)}" for n, tasks in summary["void"].items() if tasks]
    if void:
        blocks.append(f"void, dense answers less than half of them: {'; '.join(void)}")
    missing = "" if summary["complete"] else f"; {summary['missing']} records missing"
    blocks.append(f"samples per task and length: {settings.samples}{missing}")
    return "\n\n".join(blocks)


def _by_length(methods: dict[str, Any], lengths: list[int]) -> str:
    last = str(lengths[-1]) if lengths else ""
    where = f" at {length_label(lengths[-1])}" if lengths else ""
    labels = map(length_label, lengths)
    rows = [["score", *labels, "mean", "vs dense", f"KV{where}", "of dense", f"decode ms/token{where}"]]
    for name, entry in methods.items():
        columns = [entry["lengths"].get(str(n)) for n in lengths]
        cost = entry["lengths"].get(last, {})
        held, dense = cost.get("kv_bytes"), cost.get("dense_kv_bytes")
        rows.append(
            [
                name,
                *(number(column and column["score"]) for column in columns),
                number(entry["score"]),
                number(entry["vs_dense"], "+.2f"),
                size(held),
                number(held / dense if dense else None, ".1%"),
                number(cost.get("decode_ms_per_token")),
            ]
        )
    return "\n".join(aligned(rows))


def _by_task(settings: Settings, methods: dict[str, Any], length: int) -> str:
    rows = [[length_label(length), *(task.removeprefix("niah_") for task in settings.tasks)]]
    for name, entry in methods.items():
        scores = entry["lengths"].get(str(length), {"tasks": {}})["tasks"]
        rows.append([name, *(number(scores.get(task)) for task in settings.tasks)])
    return "\n".join(aligned(rows))
