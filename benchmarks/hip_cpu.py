"""One attention layer on one CPU thread: HiP, selection included, against the dense attention of PyTorch.

    python benchmarks/hip_cpu.py --out benchmarks/results/hip_cpu.json

Causal prefill in fp32, 4 query heads and 1 KV head; every query sees 512 chosen tokens, a window of 256 and 64 sinks.
Runs are interleaved, medians of CPU time are reported. The growth exponent is that of the whole of HiP between the
shortest and the longest prompt: dense attention has 2.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_accel import HiP
from llm_accel.kernels.block_sparse import block_sparse_attention
from llm_accel.kernels.hip_select import hip_select
from llm_accel.methods.hip import make_search

CONFIG = HiP(
    sink=64,
    window=256,
    budget=512,
    edge_layers=(),
    stages=((256, None, 4), (32, 4096, 4), (8, 2048, 4)),
    min_prefill_len=0,
)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of CPU time, and the result."""
    begin = time.thread_time()
    result = call()
    return time.thread_time() - begin, result


def compare(length: int, dim: int, repeats: int) -> dict[str, Any]:
    """Medians and ranges in seconds for one prompt length."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, length, dim, generator=generator)
    key, value = (torch.randn(1, 1, length, dim, generator=generator) for _ in range(2))
    search = make_search(CONFIG, CONFIG.budget, few=False)

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    times: dict[str, list[float]] = {"dense": [], "select": [], "attend": [], "hip": []}
    for _ in range(repeats):
        times["dense"].append(timed(dense)[0])
        selecting, blocks = timed(lambda: hip_select(query, key, search))
        attending, _ = timed(lambda blocks=blocks: block_sparse_attention(query, key, value, blocks, scaling=dim**-0.5))
        times["select"].append(selecting)
        times["attend"].append(attending)
        times["hip"].append(selecting + attending)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ranges = {name: [min(values), max(values)] for name, values in times.items()}
    speedup = medians["dense"] / medians["hip"]
    return {"length": length, "head_dim": dim, **medians, "speedup": speedup, "ranges": ranges}


def main() -> None:
    """Prints a line per setting and writes all of them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="4096,8192,16384,32768", help="prompt lengths, separated by commas")
    parser.add_argument("--head-dims", default="64,128", help="head dimensions, separated by commas")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved runs of each")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cells, growth = [], {}
    for dim in map(int, args.head_dims.split(",")):
        rows = [compare(length, dim, args.repeats) for length in map(int, args.lengths.split(","))]
        for row in rows:
            print(" ".join(f"{name}={value:.4g}" for name, value in row.items() if name != "ranges"), flush=True)
        first, last = rows[0], rows[-1]
        if first["length"] != last["length"]:
            growth[dim] = math.log(last["hip"] / first["hip"]) / math.log(last["length"] / first["length"])
            print(f"head_dim={dim} growth exponent {growth[dim]:.3f}", flush=True)
        cells += rows
    result = {
        "command": "benchmarks/hip_cpu.py",
        "method": CONFIG.spec(),
        "threads": 1,
        "dtype": "float32",
        "torch": torch.__version__,
        "cpu": platform.processor() or platform.machine(),
        "growth_exponent": growth,
        "cells": cells,
    }
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
