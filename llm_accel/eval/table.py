"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llm_accel.eval.lengths import length_label

NONE = "-"  # what was not measured


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width, the first to the left; a rule under the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * (sum(widths) + 2 * len(widths) - 2))
    return lines


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns have equal width, the first row as its header."""
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]
    rule = ["-" * width for width in widths]
    lines = (rows[0], rule, *rows[1:])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in lines
    )


def number(value: float | None, form: str = ".2f") -> str:
    """A number formatted by ``form``."""
    return NONE if value is None else format(value, form)


def size(count: int | None) -> str:
    """Bytes in the largest unit that leaves a number of at least 1."""
    if count is None:
        return NONE
    for unit, step in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= step:
            return f"{count / step:.2f} {unit}"
    return f"{count / 1024:.1f} KiB"


def by_length(
    head: str,
    methods: Mapping[str, Any],
    lengths: Sequence[int],
    measure: str,
    more: Mapping[str, str] | None = None,
    below: tuple[str, str] | None = None,
) -> list[str]:
    """A row for each method: a measure by length, its mean and difference to dense, memory and speed.

    KV bytes (per prompt, after generation) and decode time are those of the longest length that every method has.

    Args:
        head: what the measure is called.
        more: further columns, header and entry of a method.
        below: a second row for each method: its name, and an interval of each length.
    """
    shown = [n for n in lengths if any(str(n) in entry["lengths"] for entry in methods.values())]
    common = [n for n in shown if all(str(n) in entry["lengths"] for entry in methods.values())]
    at, more = max(common or shown, default=None), more or {}
    where = "" if at is None else f" at {length_label(at)}"
    last = [f"KV{where}", "of dense", f"decode ms/token{where}"]
    rows = [[head, *map(length_label, shown), "mean", "vs dense", *more, *last]]
    for name, entry in methods.items():
        columns = [entry["lengths"].get(str(n)) for n in shown]
        cost = entry["lengths"].get(str(at), {})
        held, dense = cost.get("kv_bytes"), cost.get("dense_kv_bytes")
        own = [number(column and column[measure]) for column in columns]
        means = [
            number(entry[measure]),
            number(entry["vs_dense"], "+.2f"),
            *(number(entry[key]) for key in more.values()),
        ]
        costs = [size(held), number(held / dense if dense else None, ".1%"), number(cost.get("decode_ms_per_token"))]
        rows.append([name, *own, *means, *costs])
        if below is not None:
            ends = [interval(column and column[below[1]]) for column in columns]
            rows.append([f"  {below[0]}", *ends, *[""] * (len(rows[0]) - len(ends) - 1)])
    return aligned(rows)


def interval(ends: Sequence[float] | None) -> str:
    """The two ends of an interval."""
    return NONE if ends is None else "{:.2f}-{:.2f}".format(*ends)


def void(summary: Mapping[str, Any]) -> list[str]:
    """A line that names, by length, the tasks on which dense stays below one half; none where there are none."""
    named = [f"{length_label(int(n))}: {', '.join(tasks)}" for n, tasks in summary["void"].items() if tasks]
    return [f"void, dense answers less than half of them: {'; '.join(named)}"] if named else []


def missing(summary: Mapping[str, Any]) -> str:
    """The footer's remark on missing records."""
    return "" if summary["complete"] else f"; {summary['missing']} records missing"
