"""What the benchmarks share, besides what ``llm-accel bench`` measures with: the mid-size model, clocks, memory.

``python -m benchmarks.common`` runs one prefill in a process of its own, so that its peak resident memory is its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

import llm_accel
from llm_accel.cache import AccelLayer
from llm_accel.common.environment import hardware, versions
from llm_accel.common.generation import cache_bytes
from llm_accel.eval.tasks.bench.candidates import make_inputs
from llm_accel.eval.tasks.bench.shapes import build, shape_config
from llm_accel.patches.cache_name import CACHE
from llm_accel.registry import parse

T = TypeVar("T")

CPU = torch.device("cpu")
MIB = 2**20
KV_HEADS, HEAD_DIM = 2, 64
TOKEN_BYTES = 2 * KV_HEADS * HEAD_DIM * 4  # one token in one layer, keys and values in fp32


def build_model(layers: int) -> PreTrainedModel:
    """The shape ``small`` in fp32: hidden 512, 8 query heads and 2 KV heads of 64, vocabulary 8192."""
    model: PreTrainedModel = build(shape_config("small", (f"num_hidden_layers={layers}",)), torch.float32, CPU, None, 0)
    return model


def make_prompt(model: PreTrainedModel, length: int) -> torch.Tensor:
    """Random token ids [1, length]."""
    return make_inputs(model, length, 1, seed=0)["input_ids"]


@torch.inference_mode()
def prefill(model: PreTrainedModel, ids: torch.Tensor, cache: DynamicCache | None) -> None:
    """One pass over the prompt; only the last row of logits is computed."""
    model(ids, **{CACHE: cache}, use_cache=cache is not None, logits_to_keep=1)


@torch.inference_mode()
def timed_step(model: PreTrainedModel, token: torch.Tensor, cache: DynamicCache) -> tuple[torch.Tensor, float]:
    """One greedy decode step on a CPU: the next token [1, 1], and milliseconds."""
    begin = time.perf_counter()
    following = model(token, **{CACHE: cache}).logits[:, -1:].argmax(-1)
    return following, (time.perf_counter() - begin) * 1e3


def cpu_seconds(call: Callable[[], T]) -> tuple[float, T]:
    """CPU time that a call takes of this thread, and its result."""
    begin = time.thread_time()
    result = call()
    return time.thread_time() - begin, result


def resident_mib(pid: int | str = "self") -> float:
    """Resident memory of a process in MiB; Linux."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS:")).split()[1]) / 1024


def storage_bytes(cache: DynamicCache) -> int:
    """Bytes of the storage behind keys and values of all layers, views included."""
    ours = [layer for layer in cache.layers if isinstance(layer, AccelLayer)]
    return sum(layer.nbytes() for layer in ours) if ours else cache_bytes(cache)


def machine() -> dict[str, Any]:
    """Hardware and versions, which belong to every figure."""
    return {"versions": versions(), "hardware": hardware(CPU)}


def conditions(**more: Any) -> dict[str, Any]:
    """The machine, and the model in fp32; ``more``: further entries, or another model."""
    return {**machine(), "dtype": "float32", "model": "shape small", **more}


def p10_p90(values: Sequence[float]) -> list[float]:
    """The ends between which eight in ten values lie."""
    ordered = sorted(values)
    return [ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]]


def publish(result: dict[str, Any], out: Path | None) -> None:
    """Prints the result as one JSON object and writes it where asked."""
    text = json.dumps(result, indent=2)
    print(text)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")


def prefill_peak(mode: str, length: int, layers: int) -> dict[str, float]:
    """:func:`measure_prefill` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.common", mode, str(length), str(layers)]
    output = subprocess.check_output(command, text=True, cwd=Path(__file__).parents[1])
    measured: dict[str, float] = json.loads(output.splitlines()[-1])
    return measured


def measure_prefill(mode: str, length: int, layers: int) -> dict[str, float]:
    """Peak resident memory of one prefill above the loaded model, in MiB, its time in seconds and the bytes it keeps.
    ``mode``: a method, ``dense``, or ``activations``, which is the prompt without a cache."""
    model = build_model(layers)
    ids = make_prompt(model, length)
    prefill(model, ids[:, :64], None)
    if mode not in ("activations", "dense"):
        llm_accel.apply(model, parse(mode))
    cache = None if mode == "activations" else DynamicCache(config=model.config)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    prefill(model, ids, cache)
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"peak_mib": peak / 1024, "seconds": seconds, "kv_bytes": 0 if cache is None else storage_bytes(cache)}


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("mode")
    arguments.add_argument("length", type=int)
    arguments.add_argument("layers", type=int)
    print(json.dumps(measure_prefill(**vars(arguments.parse_args()))))
