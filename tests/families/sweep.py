"""Runs families in processes of their own, so that one which hangs or crashes is a verdict like any other."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tests.families.verdict import FAILS, Family

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 120.0


def worker() -> None:
    """Reads cases from standard input, writes a line of JSON for each."""
    answers = os.fdopen(os.dup(1), "w")  # what models print goes to standard error instead
    os.dup2(2, 1)
    import torch
    import transformers

    from tests.families.judge import judge_family

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for case in sys.stdin:
        answers.write(json.dumps(judge_family(case.strip()).to_dict()) + "\n")
        answers.flush()


class Worker:
    """A process that judges one family after another; begun anew when one ends it or takes too long."""

    def __init__(self, timeout: float = TIMEOUT) -> None:
        self.timeout = timeout
        self.process: subprocess.Popen[str] | None = None

    def judge(self, case: str) -> Family:
        """The verdict; a crash or a timeout is one."""
        process = self.process = self.process or self._start()
        assert process.stdin is not None and process.stdout is not None
        late = threading.Timer(self.timeout, process.kill)
        late.start()
        try:
            process.stdin.write(f"{case}\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            alive = late.is_alive()
            late.cancel()
        if line:
            return Family.from_dict(json.loads(line))
        process.wait()
        self.process = None
        why = f"the process ended with {process.returncode}" if alive else f"no answer within {self.timeout:.0f} s"
        return Family(case.split("/", 1)[0], FAILS, why)

    def close(self) -> None:
        """Ends the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _start(self) -> subprocess.Popen[str]:
        environment = {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
        }
        command = [sys.executable, "-c", "from tests.families.sweep import worker; worker()"]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )


@contextmanager
def workers(jobs: int, timeout: float) -> Iterator[queue.SimpleQueue[Worker]]:
    """``jobs`` workers to take from and to give back."""
    free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    every = [Worker(timeout) for _ in range(jobs)]
    for one in every:
        free.put(one)
    try:
        yield free
    finally:
        for one in every:
            one.close()


def sweep(
    cases: Iterable[str], jobs: int = 1, timeout: float = TIMEOUT, done: Callable[[str, Family], None] | None = None
) -> dict[str, Family]:
    """Verdicts of these cases in their order; ``done`` is called after each, one at a time."""
    lock = threading.Lock()

    def one(case: str) -> tuple[str, Family]:
        mine = free.get()
        try:
            family = mine.judge(case)
        finally:
            free.put(mine)
        if done is not None:
            with lock:
                done(case, family)
        return case, family

    with workers(jobs, timeout) as free, ThreadPoolExecutor(jobs) as pool:
        return dict(pool.map(one, cases))
