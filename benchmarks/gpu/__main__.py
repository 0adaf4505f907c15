"""The first minutes on a GPU: what the card can do, every kernel against its reference, a share of the tests, the
operations whose speed was in doubt, a trace, whole models.

    python -m benchmarks.gpu --out benchmarks/results/gpu --minutes 8.5

Every item is a process of its own with a limit of its own, and a case that crashes, hangs or leaves the device unusable
costs itself alone. In the folder of ``--out``, ``results.jsonl`` has every measurement the moment it is made,
``run.log`` what all processes print, and ``summary.json`` at the end the operations with their share of the measured
roofline. What there was no time for is named. ``--more`` goes on with everything else; ``--dry-run`` walks all items in
miniature on a CPU. ``--projection`` measures nothing: it compiles the kernels of the first items and prints how long a
run will take.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu.items import Item
from benchmarks.gpu.plan import dry_items, first_items, injected, later_items
from benchmarks.gpu.projection import print_projection
from benchmarks.gpu.runner import Run, run_items
from benchmarks.gpu.summary import summarize


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu"), help="folder of the result")
    parser.add_argument("--minutes", type=float, default=8.5, help="time for everything (default: 8.5)")
    parser.add_argument("--only", nargs="+", metavar="ITEM", help="items by name; all when not given")
    parser.add_argument("--more", action="store_true", help="also everything that the first items leave out")
    parser.add_argument("--dry-run", action="store_true", help="all items in miniature, on the CPU")
    parser.add_argument("--inject", action="store_true", help="begin with cases that fail in every way")
    parser.add_argument(
        "--projection", action="store_true", help="compile, measure that, and print how long a run takes"
    )
    args = parser.parse_args(arguments)
    known = [item.name for item in chosen(args)]
    for name in args.only or ():
        if name not in known:
            parser.error(f"--only: unknown item {name!r}; allowed: {', '.join(known)}")
    return args


def chosen(args: argparse.Namespace) -> list[Item]:
    """The items that the arguments ask for, ``--only`` aside."""
    items = dry_items() if args.dry_run else [*first_items(), *(later_items() if args.more else [])]
    return [injected(), *items] if args.inject else items


def main(arguments: Sequence[str] | None = None) -> int:
    """1 when anything failed, 2 without a GPU."""
    args = parse(arguments)
    items = [item for item in chosen(args) if args.only is None or item.name in args.only]
    if args.projection:
        print_projection(items)
        return 0
    device = "cpu" if args.dry_run else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device, and torch finds none; --dry-run works without", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    run = Run(args.out, time.monotonic() + 60 * args.minutes, device)
    run.journal.path.unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # on the way out, what runs is ended too
    run_items(items, run)
    found = summarize(run.journal.records())
    (args.out / "summary.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print("\n".join(found["lines"]))
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
