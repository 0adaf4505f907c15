"""Hours of use in minutes, to see that nothing grows: one method after the other on and off a model in this process,
and a server with streams, conversations, changing methods, refusals and clients that leave.

python -m benchmarks.soak --minutes 3 --out soak.json

Memory is flat if the peaks of the last quarters do not rise; the first one warms up. Exit code 1 if they do.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import torch

import llm_accel
from benchmarks.common import machine, resident_mib
from benchmarks.server import started
from llm_accel.common.bundled import load_needle_model
from llm_accel.methods import list_methods
from llm_accel.registry import parse

_ALLOWED_GROWTH = 1.05  # the last quarter against the second: allocators keep what they once had, and round up
_METHODS = [name for name, kind in list_methods().items() if "text" in kind.info.kinds and name != "dense"]
_PATIENCE_S = 60.0


def soak(seconds: float, pid: int, step: Callable[[int], str]) -> dict[str, Any]:
    """Calls ``step`` with 0, 1, ... until the time is over: how often what came of it, and the peak of the resident
    memory of process ``pid`` in each quarter of the time, in MiB."""
    begin, number, seen = time.monotonic(), 0, Counter[str]()
    peaks = [0.0] * 4
    while (spent := time.monotonic() - begin) < seconds:
        seen[step(number)] += 1
        quarter = int(4 * spent / seconds)
        peaks[quarter] = max(peaks[quarter], resident_mib(pid))
        number += 1
    return {"seconds": spent, "outcomes": dict(seen), "peak_mib_by_quarter": peaks}


def model_step() -> Callable[[int], str]:
    """Apply, generate, remove; the weights and hooks afterwards are those of before."""
    model, _ = load_needle_model()
    before = _state(model)

    def step(number: int) -> str:
        name = _METHODS[number % len(_METHODS)]
        ids = torch.randint(3, 200, (2, 200 + 7 * (number % 40)), generator=torch.Generator().manual_seed(number))
        with llm_accel.apply(model, parse(name)) as handle:
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
            handle.report()
        return name if _state(model) == before else f"{name} left something behind"

    return step


def _state(model: Any) -> list[Any]:
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    return [hooks, sorted(vars(model)), model.config.to_json_string()]


def server_step(url: str) -> Callable[[int], str]:
    """One request of seven kinds; what the server said, or that the client left."""
    http, rng = httpx.Client(timeout=_PATIENCE_S), random.Random(0)

    def step(number: int) -> str:
        prompt = " ".join(rng.choices(["the", "old", "dog", "12", "river"], k=rng.randrange(10, 600)))
        body: dict[str, Any] = {"model": "needle", "prompt": prompt, "max_tokens": 8, "seed": number}
        kind = number % 7
        if kind == 1:
            body |= {"llm_accel": {"method": rng.choice(["dense", "h2o:budget=128", "streaming_llm:budget=64"])}}
        elif kind == 2:
            body |= {"llm_accel": {"session": f"user {rng.randrange(200)}"}}
        elif kind == 3:
            body |= {"temperature": 1.0, "n": 3, "logprobs": 2}
        elif kind == 4:
            body |= {"temperature": -1.0}
        elif kind == 5:  # a client that leaves after the first line
            with http.stream("POST", f"{url}/completions", json=body | {"stream": True, "max_tokens": 200}) as response:
                next(response.iter_lines())
            return "left"
        elif kind == 6:
            text = http.post(f"{url}/completions", json=body | {"stream": True}).text
            return "streamed" if text.endswith("data: [DONE]\n\n") else "broken stream"
        return str(http.post(f"{url}/completions", json=body).status_code)

    return step


def flat(result: dict[str, Any]) -> bool:
    """Whether the memory at the end is that after warm-up."""
    peaks = result["peak_mib_by_quarter"]
    return bool(peaks[3] <= _ALLOWED_GROWTH * peaks[1])


def main() -> int:
    """Runs both; prints the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0, help="of both together")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    seconds = 30 * args.minutes
    results = {"model": soak(seconds, os.getpid(), model_step())}
    options = {"method": "snapkv:budget=128", "allow-methods": "h2o,streaming_llm", "max-sessions": 16}
    with started({"port": 0, "max-session-mib": 8, **options}) as (url, pid):
        results["server"] = soak(seconds, pid, server_step(url))
    found = {"flat": {name: flat(result) for name, result in results.items()}, **results}
    print(json.dumps(found))
    if args.out is not None:
        args.out.write_text(json.dumps({**machine(), **found}, indent=1) + "\n", encoding="utf-8")
    return 0 if all(found["flat"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
