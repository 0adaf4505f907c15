"""A server of its own for a benchmark, and what it holds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
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


def resident_mib(pid: int) -> float:
    """Resident memory of a process in MiB; Linux."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS:")).split()[1]) / 1024
