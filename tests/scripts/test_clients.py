"""The clients' script with the client that the tests have: the others need an environment of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("openai")
SCRIPT = Path(__file__).parents[2] / "scripts/clients.py"


def test_openai_gets_its_answers() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "openai"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("openai: answers '")


def test_a_client_that_is_not_there_is_named() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "opanai"], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "opanai" in done.stderr
