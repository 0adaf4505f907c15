"""A new score is one short file and one line that makes it known; everything else finds it, this matrix too."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.pages import ROOT
from tests.third_party import KEY_NORM, install

MATRIX = ("test_invariants", "test_modes", "test_decode_compression", "test_long_generation")


def test_a_new_score_passes_the_whole_matrix(tmp_path: Path) -> None:
    """One in eight of its cases, as a package that nothing in this project names; its share is set by --share."""
    install(tmp_path, "key_norm_package", key_norm="KeyNorm")
    files = [f"tests/contracts/{name}.py" for name in MATRIX] + ["tests/patches/test_persist.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "key_norm", "--share", "8", *files],
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) >= 20


def test_it_is_short() -> None:
    assert len(KEY_NORM.splitlines()) < 40
