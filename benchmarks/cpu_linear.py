"""Products of fp32 matrices on a CPU by torch's BLAS and by oneDNN, between which a server chooses
(``llm_accel.common.cpu_linear``): GFLOP/s of both for the weights of the bundled model and of SmolLM2-135M.

OMP_NUM_THREADS=1 python -m benchmarks.cpu_linear --out cpu_linear.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import machine
from llm_accel.common.cpu_linear import onednn_is_faster, product

SHAPES = ((128, 256), (576, 576), (576, 1536), (1536, 576))  # weights: in, out
ROWS = (1, 8, 64, 256, 1024)
_SECONDS = 0.2  # of each


def gflops(multiply: Callable[[Tensor, Tensor], Tensor], rows: Tensor, weight: Tensor) -> float:
    """Of the fastest call in a while."""
    best, end = float("inf"), time.perf_counter() + _SECONDS
    multiply(rows, weight)
    while time.perf_counter() < end:
        begin = time.perf_counter()
        multiply(rows, weight)
        best = min(best, time.perf_counter() - begin)
    return 2 * rows.shape[0] * weight.numel() / best / 1e9


@torch.no_grad()
def main() -> None:
    """Measures, and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    args = parser.parse_args()
    found = []
    for width, out in SHAPES:
        weight = torch.randn(out, width)
        for count in ROWS:
            rows = torch.randn(count, width)
            blas, onednn = gflops(torch.nn.functional.linear, rows, weight), gflops(product, rows, weight)
            found.append({"in": width, "out": out, "rows": count, "blas": round(blas, 1), "onednn": round(onednn, 1)})
            print(found[-1], flush=True)
    result = {**machine(), "onednn_is_faster": onednn_is_faster(), "gflops": found}
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
