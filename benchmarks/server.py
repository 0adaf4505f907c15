"""A server of its own for a benchmark."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def started(options: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """``llm-accel serve`` with these options until the end of the block: its URL and its process id."""
    command = [sys.executable, "-m", "llm_accel", "serve"]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        assert server.stdout is not None
        try:
            yield json.loads(server.stdout.readline())["url"], server.pid
        finally:
            server.terminate()
