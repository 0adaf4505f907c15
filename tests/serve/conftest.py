"""One server for all tests that do not stop it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_accel.common.bundled import load_needle_model
from tests.serve.kit import ALICE, BOB, Running, start


@pytest.fixture(scope="session")
def needle() -> tuple[Any, Any]:
    """A second copy of the served model, for what plain ``generate`` says."""
    return load_needle_model()


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    keys = Path(tmp_path_factory.mktemp("keys")) / "keys"
    keys.write_text(f"{ALICE}\n\n{BOB}\n")
    running = start(
        *load_needle_model(),
        method="snapkv:budget=128",
        allow_methods="streaming_llm, retrieval_heads, fastv, random, vasparse",
        api_key_file=str(keys),
        max_batch=4,
        max_queue=6,
        max_body_mib=0.1,
        max_prompt_tokens=1000,
        max_new_tokens=64,
        max_sessions=2,
    )
    yield running
    running.stop()


@pytest.fixture
def running(shared: Running) -> Running:
    """The shared server, idle."""
    shared.brake.set(None)
    shared.idle()
    return shared
