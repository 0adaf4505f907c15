"""Decode time and peak memory of two checkouts of the package, step by step in turn: what a change to the stores costs.

    git worktree add /tmp/before <commit>
    python -m benchmarks.two_checkouts --before /tmp/before --out benchmarks/results/two_checkouts_cpu.json

Each checkout runs in a process of its own, on the same weights and prompts. They take turns after every few steps, and
of each turn the median counts; ``ratio`` is the median over the turns of the time here over the time before.
``peak_ratio`` compares the most bytes that tensors took at a time in prefill and the first steps, as PyTorch's profiler
counts them, once everything is compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Any

METHODS = (
    "dense",
    "snapkv:budget=512,kernel=7",  # its default was another one
    "adakv:budget=512,kernel=7",
    "h2o:budget=512",
    "streaming_llm:budget=512",
    "retrieval_heads:head_list=0.0+1.0+2.0+3.0,full_budget=512",
    "hip:sink=64,window=128,budget=256",
)
EAGER_ONLY = (
    "dense_model",
    "pyramidkv:budget=512,kernel=7",
    "random:budget=512",
    "streaming_llm:budget=512,positions=cache",
)
# options here that give the default of the other checkout, which does not know them
AS_BEFORE = {"hip": ",share_scores=raw"}
HERE = Path(__file__).resolve().parents[1]


class Side:
    """A checkout that decodes in a process of its own."""

    def __init__(self, checkout: Path, method: str, decode: str, length: int) -> None:
        command = [sys.executable, __file__, "--worker", method, decode, str(length)]
        self._process = subprocess.Popen(
            command,
            env=os.environ | {"PYTHONPATH": str(checkout), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.ask("ready")

    def ask(self, what: str) -> Any:
        """The worker's answer to one line."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """Ends the worker."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def compare(before: Path, method: str, decode: str, args: argparse.Namespace) -> dict[str, Any]:
    """One method in one way of decoding, on both sides."""
    more = AS_BEFORE.get(method.partition(":")[0], "")
    sides = {
        "before": Side(before, method, decode, args.length),
        "here": Side(HERE, method + more, decode, args.length),
    }
    turns: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(args.turns):
        for name in sorted(sides, reverse=bool(turn % 2)):
            turns[name].append(sides[name].ask(f"step {args.steps}"))
    memory = {name: side.ask("memory") for name, side in sides.items()}
    for side in sides.values():
        side.close()
    return {
        "ms_per_token": {name: statistics.median(times) for name, times in turns.items()},
        "ratio": statistics.median(h / b for h, b in zip(turns["here"], turns["before"], strict=True)),
        "tokens_equal": memory["here"]["tokens"] == memory["before"]["tokens"],
        "peak_mib": {name: content["peak_mib"] for name, content in memory.items()},
        "peak_ratio": memory["here"]["peak_mib"] / memory["before"]["peak_mib"],
        "kv_bytes": {name: content["kv_bytes"] for name, content in memory.items()},
    }


def worker(method: str, decode: str, length: int) -> None:
    """Reads the prompt with the package on PYTHONPATH, then decodes as it is told."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    import llm_accel
    from llm_accel.registry import parse

    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=512, num_hidden_layers=4, max_position_embeddings=65536, **shape)
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 512, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model(ids[:, :64])
        plugin = llm_accel.Dense() if method == "dense" else None  # a method, where the command line means none
        handle = None if method == "dense_model" else llm_accel.apply(model, plugin or parse(method), decode=decode)
        token, tokens = ids[:, -1:], []
        for measured in (False, True):  # the first time compiles, imports and fills pools
            cache: Any = DynamicCache(config=config) if handle is None else handle.new_cache()
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) if measured else nullcontext() as prof:
                model(ids, past_key_values=cache, logits_to_keep=1)
                for _ in range(2):
                    token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        for line in sys.stdin:
            answer: Any = True
            if line.startswith("step"):
                times = []
                for _ in range(int(line.split()[1])):
                    begin = time.perf_counter()
                    token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
                    times.append((time.perf_counter() - begin) * 1e3)
                    tokens.append(int(token))
                answer = statistics.median(times)
            elif line.startswith("memory"):
                held = 0 if handle is None else handle.report().kv_bytes
                answer = {"peak_mib": _peak(prof) / 2**20, "kv_bytes": held, "tokens": tokens}
            print(json.dumps(answer), flush=True)


def _peak(prof: Any) -> int:
    """The most bytes that tensors took at a time, of all that was allocated while ``prof`` looked on."""
    events = [event for event in prof.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def main() -> None:
    """Compares everything and writes one JSON object."""
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], sys.argv[3], int(sys.argv[4]))
        return
    from benchmarks.common import conditions, publish

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="the other checkout")
    parser.add_argument("--method", action="append", help="instead of all of them; repeatable")
    parser.add_argument("--decode", choices=["eager", "compiled"], action="append")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=8, help="decode steps per turn")
    parser.add_argument("--turns", type=int, default=24)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    revision = ["git", "-C", str(args.before), "rev-parse", "--short", "HEAD"]
    result: dict[str, Any] = {
        "before": subprocess.check_output(revision, text=True).strip(),
        "conditions": conditions(),
    }
    result |= {name: getattr(args, name) for name in ("length", "steps", "turns")}
    for decode in args.decode or ("eager", "compiled"):
        for method in args.method or (METHODS + (EAGER_ONLY if decode == "eager" else ())):
            result.setdefault(decode, {})[method] = compare(args.before, method, decode, args)
            print(decode, method, json.dumps(result[decode][method]), file=sys.stderr)
    publish(result, args.out)


if __name__ == "__main__":
    main()
