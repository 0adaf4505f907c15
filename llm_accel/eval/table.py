"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

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


def number(value: float | None, form: str = ".2f") -> str:
    """A number as ``form`` says."""
    return NONE if value is None else format(value, form)


def size(count: int | None) -> str:
    """Bytes in the largest unit that leaves a number of at least 1."""
    if count is None:
        return NONE
    for unit, step in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= step:
            return f"{count / step:.2f} {unit}"
    return f"{count / 1024:.1f} KiB"
