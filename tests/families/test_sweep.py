"""Every family of the installed transformers: each method is right, or refused with our error; the page says so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.families.judge import FAMILIES
from tests.families.page import page
from tests.families.sweep import Worker

DOCS = Path(__file__).resolve().parents[2] / "docs"
STORED: dict[str, Any] = json.loads((DOCS / "families.json").read_text(encoding="utf-8"))
of_the_page = pytest.mark.skipif(
    transformers.__version__ != STORED["transformers"], reason="the page is of another transformers"
)


@pytest.fixture(scope="session")
def worker() -> Iterator[Worker]:
    one = Worker()
    yield one
    one.close()


@pytest.mark.parametrize("case", FAMILIES)
def test_right_or_refused(case: str, worker: Worker) -> None:
    family = worker.judge(case)
    again = f"again: python scripts/families.py --only '{case}'"
    assert not family.failed, f"{case} {family.status}: {family.why} {family.bad}; {again}"
    if transformers.__version__ == STORED["transformers"]:
        stored = STORED["families"][case]
        said = {method: verdict["status"] for method, verdict in stored["methods"].items()}
        assert {method: verdict.status for method, verdict in family.methods.items()} == said, again
        assert family.status == stored["status"], again


def test_the_page_is_that_of_its_figures() -> None:
    assert (DOCS / "families.md").read_text(encoding="utf-8") == page(STORED)


@of_the_page
def test_the_page_names_every_family() -> None:
    assert set(STORED["families"]) == set(FAMILIES)
