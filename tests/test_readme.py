"""The README says what the code says."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from llm_accel import list_methods
from llm_accel.cli import COMMANDS
from llm_accel.method_table import markdown

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load("readme_table")


def test_the_method_table_is_up_to_date(script: ModuleType):
    assert script.with_table(README, markdown()) == README
    assert all(f"| `{name}` |" in README for name in list_methods())


@pytest.mark.parametrize("text", ["", "{begin}", "{end}{begin}", "{begin}{end}{begin}{end}"])
def test_markers_must_be_one_pair_in_order(script: ModuleType, text: str):
    with pytest.raises(ValueError, match="README"):
        script.with_table(text.format(begin=script.BEGIN, end=script.END), "table")


def test_old_rows_are_replaced(script: ModuleType):
    text = f"before {script.BEGIN}\nold\n{script.END} after"
    assert script.with_table(text, "new") == f"before {script.BEGIN}\nnew\n{script.END} after"


def test_result_tables_come_from_the_results():
    tables = load("result_tables")
    old = "<!-- results: needle needle -->\nold\n<!-- results end -->"
    new = tables.written(f"before {old} after")
    exact = json.loads((tables.RESULTS / "needle" / "summary.json").read_text())["methods"]["dense"]["lengths"]["8192"]
    assert new.startswith("before <!-- results: needle needle -->\n| exact match |") and new.endswith("end --> after")
    assert f"{exact['exact']:.2f}" in next(line for line in new.splitlines() if line.startswith("| `dense`"))
    assert tables.written(new) == new and "old" not in new
    with pytest.raises(ValueError, match="kind must be one of needle, hip_needle, vision"):
        tables.written(old.replace("needle", "table", 1))


def test_the_quick_start_has_at_most_ten_lines_and_compiles():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks[0].splitlines()) <= 10
    for block in blocks:
        compile(block, "README.md", "exec")


def test_every_command_is_named():
    assert all(f"`llm-accel {name}" in README for name in COMMANDS)


def test_every_linked_file_exists():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert links and all((ROOT / link).exists() for link in links)
