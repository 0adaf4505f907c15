"""Runs cases one after the other and writes what each of them gives: the process that an item of cases starts."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.journal import BEGIN, END, LINE, Journal

Case = Callable[[], Iterable[Mapping[str, Any]]]  # the measurements of a case, each written as it comes
UNUSABLE = 75  # exit code: the error leaves the device unusable for this process
STICKY = ("CUDA error", "cuda error", "device-side assert", "illegal memory access")


def unusable(error: Exception) -> bool:
    """Whether everything after this error would fail in the same process."""
    text = f"{type(error).__name__}: {error}"
    return "OutOfMemory" not in text and any(sign in text for sign in STICKY)


def run_case(journal: Journal, item: str, name: str, case: Case) -> bool:
    """Runs one case; whether the process can go on."""
    journal.write(item, BEGIN, case=name)
    started = time.monotonic()
    try:
        for line in case():
            journal.write(item, LINE, case=name, **line)
    except Exception as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}".strip().splitlines()
        seconds = round(time.monotonic() - started, 2)
        journal.write(item, END, case=name, seconds=seconds, error=" ".join(message[:3])[:500])
        return not unusable(error)
    journal.write(item, END, case=name, seconds=round(time.monotonic() - started, 2), error=None)
    return True


def main() -> int:
    """0 when all cases were tried, :data:`UNUSABLE` when one of them left no usable device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("group")
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--item", required=True)
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--device", required=True)
    args = parser.parse_args()
    known = importlib.import_module(f"benchmarks.gpu.{args.group}").cases(args.device)
    journal = Journal(args.journal)
    for name in args.cases:
        if not run_case(journal, args.item, name, known[name]):
            return UNUSABLE
    return 0


if __name__ == "__main__":
    sys.exit(main())
