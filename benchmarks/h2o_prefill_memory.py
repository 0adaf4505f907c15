"""Peak memory of H2O's prefill above the dense one: the column sums must cost O(n), never an n x n matrix.

    python -m benchmarks.h2o_prefill_memory --out benchmarks/results/h2o_prefill_memory_cpu.json

``extra_mib`` is what scoring costs where nothing is evicted (ratio=1.0); ``evicting_mib`` is the same with a budget,
which gives back each layer's keys and values. ``one_matrix_mib`` is n x n in fp32 for a single head of a single layer.
Each prefill runs in a process of its own; its peak counts from the loaded model on.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.common import MIB, conditions, prefill_peak, publish


def main() -> None:
    """Runs everything and prints or writes one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=(4096, 8192, 16384))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    modes = ("dense", "h2o:ratio=1.0", f"h2o:budget={args.budget}")
    result: dict[str, Any] = {
        "layers": args.layers,
        "budget": args.budget,
        "conditions": conditions(),
        "lengths": {},
    }
    for length in args.lengths:
        dense, whole, evicting = (prefill_peak(mode, length, args.layers) for mode in modes)
        result["lengths"][length] = {
            "peak_mib": {"dense": dense["peak_mib"], modes[1]: whole["peak_mib"], modes[2]: evicting["peak_mib"]},
            "extra_mib": whole["peak_mib"] - dense["peak_mib"],
            "evicting_mib": evicting["peak_mib"] - dense["peak_mib"],
            "one_matrix_mib": length * length * 4 / MIB,
            "seconds": {"dense": dense["seconds"], modes[1]: whole["seconds"], modes[2]: evicting["seconds"]},
        }
    publish(result, args.out)


if __name__ == "__main__":
    main()
