"""Runs items, each in processes of its own that nothing else depends on: what crashes, hangs or leaves the device
unusable costs its own case, and what was measured before is on disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.items import OUT, Item
from benchmarks.gpu.journal import BEGIN, END, LINE, Journal, Tail
from benchmarks.gpu.worker import UNUSABLE

STARTUP = 60.0  # seconds in which a process of cases must begin with the first of them
POLL = 0.05


@dataclass(frozen=True)
class Run:
    """Where a run writes, until when, and on which device.

    Attributes:
        folder: takes ``results.jsonl`` and ``run.log``.
        deadline: of everything, in :func:`time.monotonic` seconds.
        device: cuda, or cpu for a dry run.
    """

    folder: Path
    deadline: float
    device: str

    @property
    def journal(self) -> Journal:
        """The measurements."""
        return Journal(self.folder / "results.jsonl")

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def start(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """A process in a group of its own, whose output goes to the log."""
        with (self.folder / "run.log").open("ab") as log:
            log.write(f"\n$ python {' '.join(command)}\n".encode())
            log.flush()
            return subprocess.Popen(
                [sys.executable, *command],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                process_group=0,
            )


def run_items(items: Sequence[Item], run: Run) -> None:
    """Runs what there is time for, in order; what is left out is named."""
    for item in items:
        if item.seconds > run.left:
            run.journal.write(item.name, END, error=f"no time left: it takes about {item.seconds:.0f} s")
            report(item.name, 0.0, "no time left")
            continue
        run.journal.write(item.name, BEGIN)
        started = time.monotonic()
        error = run_command(item, run) if item.command else run_cases(item, run)
        seconds = time.monotonic() - started
        run.journal.write(item.name, END, seconds=round(seconds, 2), error=error)
        report(item.name, seconds, error)


def report(name: str, seconds: float, error: str | None) -> None:
    """One line for a terminal."""
    print(f"{name:<44} {seconds:6.1f} s  {error or 'done'}", flush=True)


def run_command(item: Item, run: Run) -> str | None:
    """One process; what went wrong. What it left in its folder is read even then."""
    with tempfile.TemporaryDirectory() as place:
        process = run.start([part.replace(OUT, place) for part in item.command])
        limit = min(item.limit, run.left)
        try:
            code = process.wait(limit)
            error = None if code == 0 else ended(code)
        except subprocess.TimeoutExpired:
            error = f"not finished after {limit:.0f} s"
        finally:
            kill(process)
        try:
            for line in item.lines(Path(place)):
                run.journal.write(item.name, LINE, **line)
        except (OSError, ValueError) as problem:
            error = error or f"its result cannot be read: {problem}"
    return error


def run_cases(item: Item, run: Run) -> str | None:
    """All cases, in as many processes as it takes; how many failed."""
    waiting, failed, until = list(item.cases), 0, min(run.deadline, time.monotonic() + item.limit)
    while waiting and time.monotonic() < until:
        failed += run_until_one_fails(item, run, waiting, until)
    if waiting:
        run.journal.write(item.name, LINE, left_over=waiting)
    problems = [f"{failed} of {len(item.cases)} failed"] if failed else []
    return ", ".join(problems + [f"{len(waiting)} left over"] * bool(waiting)) or None


def run_until_one_fails(item: Item, run: Run, waiting: list[str], until: float) -> int:
    """One process for the cases ``waiting``, from which those that were tried are taken; how many failed."""
    tail, failed, current = Tail(run.journal.path), 0, ""
    began, limit, tried = time.monotonic(), STARTUP, False
    arguments = ("-m", "benchmarks.gpu.worker", item.group, *waiting, "--item", item.name)
    process = run.start([*arguments, "--journal", str(run.journal.path), "--device", run.device])
    try:
        while True:
            code, now = process.poll(), time.monotonic()
            for record in tail.new():
                if record["event"] == BEGIN:
                    current, began, limit, tried = record["case"], now, item.case_limit, True
                elif record["event"] == END:
                    failed += record["error"] is not None
                    waiting.remove(record["case"])
                    current = ""
                    report(f"  {record['case']}", record["seconds"], record["error"])
            if code is None and now < until and now - began < limit:
                time.sleep(POLL)
            elif not waiting or (code == UNUSABLE and not current):
                return failed
            else:
                reason = f"not finished after {now - began:.0f} s" if code is None else ended(code)
                cases = [current] if tried or now >= until else list(waiting)
                return failed + give_up(item, run, waiting, cases, now - began, reason)
    finally:
        kill(process)


def give_up(item: Item, run: Run, waiting: list[str], cases: Sequence[str], seconds: float, reason: str) -> int:
    """Records cases whose process is gone, and takes them off the list; how many they are."""
    for case in filter(None, cases):
        run.journal.write(item.name, END, case=case, seconds=round(seconds, 2), error=reason)
        report(f"  {case}", seconds, reason)
        waiting.remove(case)
    return len([*filter(None, cases)])


def kill(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and those that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def ended(code: int) -> str:
    """An exit code in words."""
    return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
