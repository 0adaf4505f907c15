"""Cases that fail in every way a case can, for the test of the runner; ``--inject`` puts them in front of a run."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.worker import Case

_POISONED = False


def sound() -> Iterator[dict[str, Any]]:
    """Works, unless a case before it in the same process left the device unusable."""
    if _POISONED:
        raise RuntimeError("CUDA error: the context is gone")
    yield {"value": 1}


def error() -> Iterator[dict[str, Any]]:
    """An error of the code alone, after a measurement."""
    yield {"value": 2}
    raise ValueError("a shape that does not fit")


def sticky() -> Iterator[dict[str, Any]]:
    """An error after which the process can do nothing on its device."""
    global _POISONED
    _POISONED = True
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
    yield {}


def crash() -> Iterator[dict[str, Any]]:
    """The process dies."""
    os.kill(os.getpid(), signal.SIGSEGV)
    yield {}


def hang() -> Iterator[dict[str, Any]]:
    """Never ends."""
    yield {"value": 3}
    time.sleep(3600)


def cases(device: str) -> dict[str, Case]:
    """Failures, and a sound case after each of them."""
    failures = {"error": error, "sticky error": sticky, "crash": crash, "hang": hang}
    return failures | {f"sound after {name}": sound for name in failures}


NAMES = tuple(
    name for failure in ("error", "sticky error", "crash", "hang") for name in (failure, f"sound after {failure}")
)
