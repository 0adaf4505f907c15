"""What an item of a run is: a process, or cases that take turns in one."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUT = "{out}"  # in a command: a folder that it may write to
Lines = Callable[[Path], Iterator[dict[str, Any]]]  # measurements from what a command left in its folder


def nothing(folder: Path) -> Iterator[dict[str, Any]]:
    """No measurements."""
    yield from ()


@dataclass(frozen=True)
class Item:
    """One part of a run.

    Attributes:
        name: what the result calls it.
        seconds: how long it takes, roughly; it is not begun with less time left.
        limit: seconds after which its processes are killed.
        command: what follows ``python``; :data:`OUT` in it becomes a folder. Empty for an item of cases.
        lines: reads what a command left there.
        group: module beside this one whose ``cases(device)`` has the cases.
        cases: their names, in order.
        case_limit: seconds after which one of them has failed; the next begins in a fresh process.
        running: seconds beside starting, compiling and cases: an estimate from what is built, read and computed.
        methods: names of those whose kernels it compiles.
        graphs: layers of the decode steps that it compiles, one after the other.
        kernels_of_tests: whether its tests compile kernels.
        workers: processes that share its kernels.
    """

    name: str
    seconds: float
    limit: float
    command: tuple[str, ...] = ()
    lines: Lines = nothing
    group: str = ""
    cases: tuple[str, ...] = ()
    case_limit: float = 0.0
    running: float = 0.0
    methods: tuple[str, ...] = ()
    graphs: tuple[int, ...] = ()
    kernels_of_tests: bool = False
    workers: int = 1


def bench_lines(folder: Path) -> Iterator[dict[str, Any]]:
    """The cells of ``llm-accel bench``, or the waits of a trace."""
    import json

    for path in sorted((*folder.glob("bench.json"), *folder.glob("syncs.json"))):
        found = json.loads(path.read_text(encoding="utf-8"))
        if "cells" in found:
            yield from ({"cell": cell} for cell in found["cells"])
            yield from ({"failed": name, "error": error} for name, error in found.get("failed", {}).items())
        else:
            yield found


def junit_lines(folder: Path) -> Iterator[dict[str, Any]]:
    """Counts of a test run, then its failures."""
    for path in sorted(folder.glob("*.xml")):
        suite = ElementTree.parse(path).getroot().find("testsuite")
        if suite is None:
            continue
        yield {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
        for case in suite.iter("testcase"):
            for problem in (*case.findall("failure"), *case.findall("error")):
                yield {
                    "test": f"{case.get('classname')}::{case.get('name')}",
                    "error": problem.get("message", "")[:500],
                }
