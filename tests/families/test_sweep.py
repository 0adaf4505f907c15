"""Every family of the installed transformers: each method is right, or refused with our own error."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.families.judge import FAMILIES
from tests.families.sweep import Worker


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
