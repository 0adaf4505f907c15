"""Runs the notebooks of ``docs/notebooks`` from top to bottom and writes what they print into them.

It needs no Jupyter: a cell is executed as Python, and what it prints, its last value and its figures become its output.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "notebooks"


def run(book: dict[str, Any], name: str) -> dict[str, Any]:
    """The notebook with the outputs of a fresh run; what a cell raises is raised here."""
    names: dict[str, Any] = {"__name__": "__main__"}
    cells, count = [], 0
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            count += 1
            cell = cell | {
                "execution_count": count,
                "outputs": _execute("".join(cell["source"]), names, f"{name} [{count}]"),
            }
        cells.append(cell)
    return book | {"cells": cells}


def _execute(source: str, names: dict[str, Any], place: str) -> list[dict[str, Any]]:
    tree, printed, value = ast.parse(source, place), io.StringIO(), None
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, place, "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), place, "eval"), names)
    text = printed.getvalue()
    outputs: list[dict[str, Any]] = (
        [] if not text else [{"output_type": "stream", "name": "stdout", "text": _lines(text)}]
    )
    if value is not None:
        outputs.append({"output_type": "display_data", "metadata": {}, "data": _shown(value)})
    return outputs


def _shown(value: Any) -> dict[str, Any]:
    if not hasattr(value, "savefig"):
        return {"text/plain": _lines(repr(value))}
    picture = io.BytesIO()
    value.savefig(picture, format="png", dpi=110, bbox_inches="tight")
    return {"image/png": base64.b64encode(picture.getvalue()).decode()}


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def main() -> None:
    """Runs all of them."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        book = run(json.loads(path.read_text(encoding="utf-8")), path.name)
        path.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(path.name, file=sys.stderr)


if __name__ == "__main__":
    main()
