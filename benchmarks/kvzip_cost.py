"""What compression by KVzip costs beside the prefill: ``python -m benchmarks.kvzip_cost --model smollm2-135m``.

Seconds of processor time of one thread, which other processes do not lengthen: reading a prompt of random tokens, and
reading it again, scoring and evicting three quarters of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import llm_accel
from benchmarks.common import cpu_seconds, machine, publish
from llm_accel.common.arguments import ModelOptions
from llm_accel.common.loading import load_text_model

METHOD = "kvzip:ratio=0.25"


def cost(model: Any, length: int) -> dict[str, Any]:
    """Both times and their ratio, for one prompt."""
    ids = torch.randint(100, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(length))
    with llm_accel.apply(model, METHOD) as handle:
        handle.resume(handle.record(ids[:, :64]))  # the first call also pays for set-up
        prefill, recording = cpu_seconds(lambda: handle.record(ids))
        compression, _ = cpu_seconds(lambda: handle.resume(recording))
    seconds = {"prefill_s": round(prefill, 2), "compression_s": round(compression, 2)}
    return {"length": length, **seconds, "ratio": round(compression / prefill, 2)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=None)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = {}
    for dtype in options.dtypes:
        model, _, _ = load_text_model(ModelOptions(model=options.model, dtype=dtype, device="cpu"))
        found[dtype] = [cost(model, length) for length in options.lengths]
    publish({**machine(), "model": options.model or "bundled", "method": METHOD, "cost": found}, options.out)


if __name__ == "__main__":
    main()
