"""Peak memory of reading prompts: whole or in pieces, at once or one after the other.

    python -m benchmarks.prefill_memory --out benchmarks/results/prefill_memory_cpu.json

Bytes of the tensor storages that operations make, weights left out; scratch space inside one operation is not seen.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import llm_accel
from benchmarks.common import MIB, build_model, conditions, make_inputs, publish
from llm_accel.eval.tasks.bench.memory import TensorBytes
from llm_accel.registry import parse


def peaks(model: Any, method: str, length: int, batch: int, chunk: int) -> dict[str, float]:
    """MiB of one prompt and of a batch of prompts, read in different ways."""
    ids = make_inputs(model, length, batch, 0)["input_ids"]
    found = {}
    ways: dict[str, tuple[str | None, int | None, int]] = {
        "dense": (None, None, 1),
        method: (method, None, 1),
        f"{method}, mlp_chunk={chunk}": (method, chunk, 1),
        f"dense, {batch} prompts": (None, None, batch),
        f"{method}, {batch} prompts": (method, None, batch),
        f"{method}, {batch} prompts, prefill(rows=1)": (method, None, batch),
        f"{method}, {batch} prompts, prefill(rows=1), mlp_chunk={chunk}": (method, chunk, batch),
    }
    for name, (applied, pieces, rows) in ways.items():
        handle = None if applied is None else llm_accel.apply(model, parse(applied), mlp_chunk=pieces)
        with TensorBytes() as memory:
            if handle is not None and "rows=1" in name:
                handle.prefill(ids[:rows])
            else:
                model.generate(ids[:rows], attention_mask=torch.ones_like(ids[:rows]), max_new_tokens=1)
        found[name] = memory.peak / MIB
        llm_accel.remove(model)
    return found


def main() -> None:
    """Prints the result and writes it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="snapkv:budget=512")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model = build_model(args.layers)
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    found = peaks(model, args.method, args.length, args.batch, args.chunk)
    publish({"settings": settings, **conditions(), "peak_mib": found}, args.out)


if __name__ == "__main__":
    main()
