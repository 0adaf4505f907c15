"""One name, one class: whoever reads a name finds one place."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import llm_accel

PACKAGE = Path(llm_accel.__file__).parent


def test_no_class_name_is_defined_twice() -> None:
    trees = (ast.parse(file.read_text()) for file in PACKAGE.rglob("*.py"))
    names = Counter(node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    assert len(names) > 100 and [name for name, count in names.items() if count > 1] == []
