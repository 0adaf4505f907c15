"""Needle accuracy of HiP's selectors on the bundled model, against the share of the context that a query sees.

    python -m benchmarks.hip_needle --out benchmarks/results/hip_needle

No layer is left dense and no prompt is too short, unless a row says so. A share counts everything that a query sees:
16 sinks, a window of 64, and the budget. Each length is one run of ``llm-accel needle`` in a directory of its own,
which is resumed if interrupted. The two coarse stages hand on a half and a quarter of the context, in the rows
``all keys enter`` everything.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_accel import HiP, cli
from llm_accel.eval.lengths import length_label, parse_lengths
from llm_accel.eval.tasks.needle import command

SINK, WINDOW = 16, 64
SHARES = (1 / 16, 1 / 8, 1 / 4)
ROWS: dict[str, dict[str, Any]] = {
    "exact": {"selector": "exact"},
    "exact, chosen at every step": {"selector": "exact", "refresh": (1, 1, 1)},
    "stages": {},
    "stages, chosen at every step": {"refresh": (1, 1, 1)},
    "stages, all keys enter": {"enter": (1, 1)},
    "stages, all keys enter, chosen at every step": {"enter": (1, 1), "refresh": (1, 1, 1)},
    "stages, first layer dense": {"dense_layers": (0,)},
    "stages, first and last layer dense": {"dense_layers": (0, -1)},
    "tree": {"selector": "tree"},
    "tree, first layer dense": {"selector": "tree", "dense_layers": (0,)},
    "tree, first and last layer dense": {"selector": "tree", "dense_layers": (0, -1)},
}


def config(length: int, share: float, enter: tuple[int, int] = (2, 4), **options: Any) -> HiP:
    """One row at one share; ``enter``: the part of the context that enters the second and the third stage."""
    second, third = (length // part for part in enter)
    return HiP(
        sink=SINK,
        window=WINDOW,
        budget=int(length * share) - SINK - WINDOW,
        stages=((256, None, 4), (32, second, 4), (8, third, 1)),
        edge_layers=(),
        min_prefill_len=0,
        **options,
    )


def measure(
    length: int, out: Path, depths: str, samples: int, rows: Sequence[str], shares: Sequence[float]
) -> tuple[float, dict[str, list[float]]]:
    """Exact answers of the dense model, and of each row by share."""
    specs = {
        row: [config(length, share, **options).spec() for share in shares]
        for row, options in ROWS.items()
        if row in rows
    }
    words = ["needle", "--lengths", str(length), "--depths", depths, "--samples", str(samples), "--no-plot"]
    for spec in ("dense", *(spec for row in specs.values() for spec in row)):
        words += ["--method", spec]
    _, options = cli.parse([*words, "--out", str(out / f"needle_{length_label(length)}")])
    summary = command.run(options)
    exact = {spec: entry["exact"] for spec, entry in summary["methods"].items()}
    return exact["dense"], {row: [exact[spec] for spec in row_specs] for row, row_specs in specs.items()}


def main() -> None:
    """Prints one table per length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="4k,8k", help="prompt lengths, separated by commas")
    parser.add_argument("--depths", default="11", help="as for llm-accel needle")
    parser.add_argument("--samples", type=int, default=4, help="prompts per depth")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="which rows of the table")
    parser.add_argument(
        "--shares", nargs="+", type=float, default=SHARES, help="parts of the context, 0.125 for 12.5 %%"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/hip_needle"), help="where the runs go")
    args = parser.parse_args()
    for length in parse_lengths(args.lengths):
        dense, rows = measure(length, args.out, args.depths, args.samples, args.rows, args.shares)
        print(
            f"\n| {length_label(length)}, dense {dense:.2f} | "
            + " | ".join(f"{share:.2%}" for share in args.shares)
            + " |"
        )
        print("|---|" + "---|" * len(args.shares))
        for row, exact in rows.items():
            print(f"| {row} | " + " | ".join(f"{value:.2f}" for value in exact) + " |")


if __name__ == "__main__":
    main()
