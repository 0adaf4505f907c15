"""One attention layer on one CPU thread: HiP, selection included, against the dense attention of PyTorch.

    python -m benchmarks.hip_cpu --out benchmarks/results/hip_cpu.json

Causal prefill in fp32, 4 query heads and 1 KV head. Two settings: ``small``, where a query sees 512 chosen tokens, a
window of 256 and 64 sinks, and ``default``, HiP's own. Runs are interleaved, medians of CPU time are reported. The
growth exponent is that of the whole of HiP between the shortest and the longest prompt: dense attention has 2. The
break-even length is where HiP becomes faster, by interpolation.
"""

from __future__ import annotations

import argparse
import math
import statistics
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import cpu_seconds, machine, publish
from llm_accel import HiP
from llm_accel.kernels.block_list import BlockList
from llm_accel.kernels.block_sparse import block_sparse_attention
from llm_accel.kernels.hip_select import hip_select
from llm_accel.methods.sparse.hip import make_search

SETTINGS = {
    "small": HiP(
        sink=64,
        window=256,
        budget=512,
        edge_layers=(),
        stages=((256, None, 4), (32, 4096, 4), (8, 2048, 4)),
        min_prefill_len=0,
    ),
    "default": HiP(edge_layers=(), min_prefill_len=0),
}


def compare(length: int, dim: int, repeats: int) -> dict[str, Any]:
    """Seconds of the dense attention, and of each setting's selection, attention and both: median, least and most."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, length, dim, generator=generator)
    key, value = (torch.randn(1, 1, length, dim, generator=generator) for _ in range(2))

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    def attend(blocks: BlockList) -> Tensor:
        return block_sparse_attention(query, key, value, blocks, scaling=dim**-0.5)[0]

    times: dict[str, list[float]] = {"dense": []}
    for _ in range(repeats):
        times["dense"].append(cpu_seconds(dense)[0])
        for name, config in SETTINGS.items():
            search = make_search(config, config.budget, few=False)
            selecting, blocks = cpu_seconds(partial(hip_select, query, key, search))
            attending, _ = cpu_seconds(partial(attend, blocks))
            for part, seconds in (("select", selecting), ("attend", attending), ("hip", selecting + attending)):
                times.setdefault(f"{name} {part}", []).append(seconds)
    seconds = {name: [statistics.median(values), min(values), max(values)] for name, values in times.items()}
    speedup = {name: seconds["dense"][0] / seconds[f"{name} hip"][0] for name in SETTINGS}
    return {"length": length, "head_dim": dim, "seconds": seconds, "speedup": speedup}


def growth(rows: list[dict[str, Any]], name: str) -> float:
    """Exponent of the length in HiP's time, from the first row to the last."""
    first, last = (math.log(row["seconds"][f"{name} hip"][0]) for row in (rows[0], rows[-1]))
    return (last - first) / math.log(rows[-1]["length"] / rows[0]["length"])


def break_even(rows: list[dict[str, Any]], name: str) -> float | None:
    """The length at which HiP takes as long as dense attention; None outside of what was measured."""
    for short, long in pairwise(rows):
        before, after = math.log(short["speedup"][name]), math.log(long["speedup"][name])
        if before <= 0 < after:
            part = before / (before - after)
            return float(short["length"] * (long["length"] / short["length"]) ** part)
    return None


def main() -> None:
    """Prints a line per length, then everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="4096,8192,16384,32768", help="prompt lengths, separated by commas")
    parser.add_argument("--head-dims", default="64,128", help="head dimensions, separated by commas")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved runs of each")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cells, totals = [], {}
    for dim in map(int, args.head_dims.split(",")):
        rows = []
        for length in map(int, args.lengths.split(",")):
            rows.append(compare(length, dim, args.repeats))
            medians = " ".join(f"{name}={values[0]:.4g}" for name, values in rows[-1]["seconds"].items())
            print(f"{length=} head_dim={dim} {medians} speedup={rows[-1]['speedup']}", flush=True)
        if len(rows) > 1:
            totals[f"head_dim {dim}"] = {
                name: {"growth_exponent": growth(rows, name), "break_even": break_even(rows, name)} for name in SETTINGS
            }
        cells += rows
    result = {
        "command": "benchmarks.hip_cpu",
        "settings": {name: config.spec() for name, config in SETTINGS.items()},
        "threads": 1,
        "dtype": "float32",
        **machine(),
        "totals": totals,
        "cells": cells,
    }
    publish(result, args.out)


if __name__ == "__main__":
    main()
