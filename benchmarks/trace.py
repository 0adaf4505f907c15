"""A profiler trace of decode steps, and how often they make the host wait for the device: never, it should say.

python -m benchmarks.trace --out benchmarks/results/trace
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import llm_accel
from llm_accel.eval.tasks.bench.candidates import make_inputs
from llm_accel.eval.tasks.bench.shapes import build, shape_config
from llm_accel.registry import parse_all

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "Memcpy DtoH", "aten::_local_scalar")


def waits(names: Iterable[str]) -> dict[str, int]:
    """How often each kind of waiting occurs among the names of events."""
    return dict(Counter(kind for name in names for kind in WAITS if name.startswith(kind)))


@torch.inference_mode()
def trace(model: Any, method: str, decode: Any, length: int, steps: int, folder: Path) -> dict[str, Any]:
    """Decodes after a prompt of ``length`` tokens and profiles the last ``steps``; the trace goes into ``folder``."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if model.device.type == "cuda" else [])]
    with llm_accel.apply(model, parse_all(method), decode=decode) as handle:
        cache = handle.new_cache()
        token = model(**make_inputs(model, length, 1, 0), past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
        for _ in range(5):  # compiles, warms up, captures
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        with profile(activities=activities) as profiler:
            for _ in range(steps):
                token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        said = handle.report().backends.get("decode steps")
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / "trace.json.gz"))
    found = waits(event.name for event in profiler.events())
    return {"method": method, "length": length, "steps": steps, "decode": said, "waits": found}


def main() -> int:
    """Writes trace.json.gz and syncs.json; 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="of the model; all of the shape when not given")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: eager steps, for trying it out")
    parser.add_argument("--method", default="snapkv:budget=2048")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/trace"))
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.trace needs a CUDA device; torch finds none", file=sys.stderr)
        return 2
    changes = () if args.layers is None else (f"num_hidden_layers={args.layers}",)
    model = build(shape_config(args.shape, changes), torch.bfloat16, torch.device(args.device), None, 0)
    decode = "compiled" if args.device == "cuda" else "eager"
    found = trace(model, args.method, decode, args.length, args.steps, args.out)
    (args.out / "syncs.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
