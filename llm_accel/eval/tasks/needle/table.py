"""The summary as a text table."""

from __future__ import annotations

from typing import Any

from llm_accel.eval.table import NONE, aligned, number, size
from llm_accel.eval.tasks.needle.settings import Settings, length_label


def title(settings: Settings, model: str) -> str:
    """One line that says what was run: model, task, kinds and whether the question was seen during compression."""
    needles = f"{settings.needles} needle{'s' if settings.needles > 1 else ''}"
    if settings.distractors:
        needles += f" + {settings.distractors} distractors"
    aware = "query-agnostic (question after compression)" if settings.query_agnostic else "query-aware"
    return f"needle: {model}, {settings.task}, {needles}, {settings.key_kind} -> {settings.value_kind}, {aware}"


def render(settings: Settings, summary: dict[str, Any], model: str) -> str:
    """Exact match per length with 95 % Wilson intervals below, mean, difference to dense, memory and speed.

    KV bytes (per prompt, after generation) and decode time are those of the longest length that every method has.
    """
    methods: dict[str, Any] = summary["methods"]
    lengths = [length for length in settings.lengths if any(str(length) in m["lengths"] for m in methods.values())]
    common = [length for length in lengths if all(str(length) in m["lengths"] for m in methods.values())]
    at = max(common or lengths, default=None)
    where = "" if at is None else f" at {length_label(at)}"
    header = [
        "exact match",
        *map(length_label, lengths),
        "mean",
        "vs dense",
        "ROUGE-1 recall",
        f"KV{where}",
        "of dense",
        f"decode ms/token{where}",
    ]
    rows = [header]
    for name, entry in methods.items():
        columns = [entry["lengths"].get(str(length)) for length in lengths]
        last = entry["lengths"].get(str(at), {})
        held, dense = last.get("kv_bytes"), last.get("dense_kv_bytes")
        rows.append(
            [
                name,
                *(number(column and column["exact"]) for column in columns),
                number(entry["exact"]),
                number(entry["vs_dense"], "+.2f"),
                number(entry["rouge1_recall"]),
                size(held),
                number(held / dense if dense else None, ".1%"),
                number(last.get("decode_ms_per_token")),
            ]
        )
        rows.append(["  95 % interval", *(_interval(column) for column in columns), *[""] * 6])
    lines = [title(settings, model), *aligned(rows)]
    counts = sorted({column["n"] for m in methods.values() for column in m["lengths"].values()})
    n = NONE if not counts else str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    missing = "" if summary["complete"] else f"; {summary['missing']} records missing"
    lines.append(f"samples per length: {n}{missing}")
    return "\n".join(lines)


def _interval(column: dict[str, Any] | None) -> str:
    return NONE if column is None else "{:.2f}-{:.2f}".format(*column["ci95"])
