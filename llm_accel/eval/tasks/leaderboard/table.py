"""The board as Markdown that is also readable in a terminal: a row per method, a column per compression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llm_accel.eval.lengths import length_label
from llm_accel.eval.summary import DENSE
from llm_accel.eval.table import NONE, interval, markdown, missing, void


def compression(ratio: float) -> str:
    """0.25 -> ``4:1``."""
    return f"{1 / ratio:.3g}:1"


def tables(summary: dict[str, Any]) -> str:
    """A table over all lengths for each way, then, where there are several lengths, one for each of them."""
    lengths = summary["lengths"]
    blocks = [_table(name, rows, summary["ratios"], None) for name, rows in summary["ways"].items()]
    if len(lengths) > 1:
        for name, rows in summary["ways"].items():
            blocks += [_table(f"{name}, {length_label(n)}", rows, summary["ratios"], str(n)) for n in lengths]
    tasks = ", ".join(summary["tasks"])
    blocks.append(
        "score (95 % Wilson interval), KV bytes held when the answer begins, in percent of dense's; "
        f"lengths: {', '.join(map(length_label, lengths))}; samples per task and length: {summary['samples']}; "
        f"tasks: {tasks}{missing(summary)}"
    )
    return "\n\n".join(
        [*blocks, *void(summary), *(f"left out: {name}: {reason}" for name, reason in summary["left_out"].items())]
    )


def _table(title: str, rows: dict[str, Any], ratios: Sequence[float], length: str | None) -> str:
    header = [title, "1:1", *map(compression, ratios)]
    body = [[DENSE, _cell(rows[DENSE], length), *[""] * len(ratios)]]
    for entry in dict.fromkeys(row["entry"] for row in rows.values() if row["entry"] is not None):
        own = {row["ratio"]: row for row in rows.values() if row["entry"] == entry}
        floor = " (floor)" if next(iter(own.values()))["floor"] else ""
        body.append([f"`{entry}`{floor}", "", *(_cell(own.get(ratio), length) for ratio in ratios)])
    return markdown([header, *body])


def _cell(row: dict[str, Any] | None, length: str | None) -> str:
    """Score, interval and share of the bytes held."""
    found = row if row is None or length is None else row["lengths"].get(length)
    if found is None or not found["n"]:
        return NONE
    share = "" if found["held"] is None else f", {found['held']:.1%}"
    return f"{found['score']:.2f} ({interval(found['ci95'])}){share}"
