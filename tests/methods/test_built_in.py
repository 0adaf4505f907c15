"""A method of the package is its file, its page and one line: the table, the classes and the menu find it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.pages import ROOT
from tests.third_party import KEY_NORM

LAST = "from llm_accel.methods.dense import Dense as Dense\n"
ASKED = """
import llm_accel
from llm_accel.method_table import describe
from scripts.docs_hooks import method_pages
from pathlib import Path

assert llm_accel.KeyNorm(budget=3) == llm_accel.registry.parse("key_norm:budget=3")
assert list(describe())[-2:] == ["key_norm", "dense"]
print(*method_pages(Path("docs/methods"))["KV cache"][-2:])
"""


def test_one_line_makes_a_method_known(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "llm_accel", tmp_path / "llm_accel", ignore=shutil.ignore_patterns("needle", "vision"))
    shutil.copytree(ROOT / "docs" / "methods", tmp_path / "docs" / "methods")
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    (tmp_path / "llm_accel/methods/kv/key_norm.py").write_text(KEY_NORM, encoding="utf-8")
    (tmp_path / "docs/methods/key_norm.md").write_text("# Key norm\n\n<!-- options: key_norm -->\n", encoding="utf-8")
    known = tmp_path / "llm_accel/methods/__init__.py"
    line = "from llm_accel.methods.kv.key_norm import KeyNorm as KeyNorm\n"
    known.write_text(known.read_text(encoding="utf-8").replace(LAST, line + LAST), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", "import llm_accel.registry\n" + ASKED],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["methods/key_norm.md", "methods/dense.md"]
