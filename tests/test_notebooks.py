"""The notebooks of the documentation run, and what the pages show of them."""

from __future__ import annotations

import json

import pytest

from tests.test_readme import ROOT, load

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("name", [path.name for path in NOTEBOOKS])
def test_notebooks_run(name: str):
    pytest.importorskip("matplotlib")
    stored = json.loads((ROOT / "docs" / "notebooks" / name).read_text(encoding="utf-8"))
    again = load("notebooks").run(stored, name)
    for before, after in zip(stored["cells"], again["cells"], strict=True):
        kinds = [[output["output_type"] for output in cell.get("outputs", ())] for cell in (before, after)]
        assert kinds[0] == kinds[1] and (before["cell_type"] == "markdown" or kinds[0] != []), before["id"]


def test_a_cell_prints_shows_and_fails():
    book = {"cells": [{"cell_type": "code", "source": ["print('said')\n", "6 * 7"]}]}
    (cell,) = load("notebooks").run(book, "book")["cells"]
    assert [output["output_type"] for output in cell["outputs"]] == ["stream", "display_data"]
    assert "said\n" in cell["outputs"][0]["text"] and cell["outputs"][1]["data"] == {"text/plain": ["42"]}
    with pytest.raises(ZeroDivisionError):
        load("notebooks").run({"cells": [{"cell_type": "code", "source": ["1 / 0"]}]}, "book")
