"""Memory and decode time of a long prompt on a mid-size random-weight model, dense against a method.

    python benchmarks/memory_decode.py --method snapkv:budget=512 --out benchmarks/results/memory_decode_cpu.json

Each prefill runs in a process of its own, so that its peak resident memory is its own. ``activations`` is the same
prompt without a cache: what the prompt costs whatever is cached. Decode times are interleaved and reported as medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache

import llm_accel
from llm_accel.registry import parse

MIB = 2**20


def build_model(layers: int) -> PreTrainedModel:
    """Random-weight Llama in fp32: hidden 512, 8 query heads and 2 KV heads of 64, vocabulary 8192."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=131072,
    )
    return LlamaForCausalLM(config).eval()


def make_prompt(length: int) -> torch.Tensor:
    """Random token ids [1, length]."""
    return torch.randint(3, 8192, (1, length), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def prefill(model: PreTrainedModel, ids: torch.Tensor, cache: DynamicCache | None) -> None:
    """One pass over the prompt; only the last row of logits is computed."""
    model(ids, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1)


def prefill_peak(mode: str, length: int, layers: int) -> dict[str, float]:
    """Peak resident memory of one prefill above the loaded model, in MiB, and its time in seconds."""
    model, ids = build_model(layers), make_prompt(length)
    prefill(model, make_prompt(64), None)
    handle = None if mode in ("activations", "dense") else llm_accel.apply(model, parse(mode))
    cache = None if mode == "activations" else DynamicCache(config=model.config)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    prefill(model, ids, cache)
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    held = 0 if cache is None else sum(_storage_bytes(layer) for layer in cache.layers)
    if handle is not None:
        handle.remove()
    return {"peak_mib": peak / 1024, "seconds": seconds, "kv_bytes": held}


def _storage_bytes(layer: Any) -> int:
    return int(layer.keys.untyped_storage().nbytes() + layer.values.untyped_storage().nbytes())


@torch.inference_mode()
def decode_times(model: PreTrainedModel, cache: DynamicCache, steps: int) -> list[float]:
    """Milliseconds of each of ``steps`` greedy decode steps."""
    token, times = torch.zeros(1, 1, dtype=torch.long), []
    for _ in range(steps):
        begin = time.perf_counter()
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        times.append((time.perf_counter() - begin) * 1e3)
    return times


def compare_decode(method: str, length: int, layers: int, steps: int, rounds: int) -> dict[str, Any]:
    """Median decode time of the dense model and of the method, measured in turns on the same prompt."""
    model, ids = build_model(layers), make_prompt(length)
    dense_cache = DynamicCache(config=model.config)
    prefill(model, ids, dense_cache)
    handle = llm_accel.apply(model, parse(method))
    cache = handle.new_cache()
    prefill(model, ids, cache)
    kept = [int(layer.physical_length) for layer in handle.report().layers]
    formula = sum(2 * 2 * entries * 64 * 4 for entries in kept)
    held = sum(_storage_bytes(layer) for layer in cache.layers)
    dense_bytes = sum(_storage_bytes(layer) for layer in dense_cache.layers)
    times: dict[str, list[float]] = {"dense": [], "method": []}
    for _ in range(rounds):
        with handle.disabled():
            times["dense"] += decode_times(model, dense_cache, steps)[1:]
        times["method"] += decode_times(model, cache, steps)[1:]
    weights = sum(p.nbytes for name, p in model.named_parameters() if "embed_tokens" not in name)
    bound = (weights + dense_bytes) / (weights + held)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "entries_kept": kept,
        "kv_bytes_held": held,
        "kv_bytes_formula": formula,
        "dense_kv_bytes": dense_bytes,
        "weight_bytes_per_step": weights,
        "decode_ms": medians,
        "decode_ms_p10_p90": {
            name: [sorted(values)[len(values) // 10], sorted(values)[-1 - len(values) // 10]]
            for name, values in times.items()
        },
        "speedup": medians["dense"] / medians["method"],
        "bound": bound,
        "share_of_bound": medians["dense"] / medians["method"] / bound,
    }


def main() -> None:
    """Runs everything and prints or writes one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="snapkv:budget=512")
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=16, help="decode steps per round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(prefill_peak(args.child, args.length, args.layers)))
        return
    result: dict[str, Any] = {
        "method": args.method,
        "length": args.length,
        "layers": args.layers,
        "conditions": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "llm_accel": llm_accel.__version__,
            "dtype": "float32",
            "model": "random-weight Llama, hidden 512, 8 query / 2 KV heads, head_dim 64",
        },
        "prefill": {},
    }
    for mode in ("activations", "dense", args.method):
        command = [
            sys.executable,
            __file__,
            "--child",
            mode,
            "--length",
            str(args.length),
            "--layers",
            str(args.layers),
        ]
        result["prefill"][mode] = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
    layer_kv = 2 * 2 * args.length * 64 * 4 / MIB
    growth = result["prefill"][args.method]["peak_mib"] - result["prefill"]["activations"]["peak_mib"]
    result["peak_growth_mib"] = {"measured": growth, "allowed": layer_kv + 64, "one_layer_kv": layer_kv}
    result["decode"] = compare_decode(args.method, args.length, args.layers, args.steps, args.rounds)
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
