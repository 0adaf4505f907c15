"""Load on a server: many completions of mixed length, first many in flight, then the same ones one at a time. Outcomes,
equality of the answers, throughput, latency, memory of the server and its metrics as JSON.

python -m benchmarks.serve_load --out load.json                    # starts llm-accel serve on the bundled model
python -m benchmarks.serve_load --url http://127.0.0.1:8000/v1     # a server that runs; key in LLM_ACCEL_API_KEY
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.common import machine, resident_mib
from benchmarks.server import started
from llm_accel.eval.tasks.bench_serve.client import OK, ServerClient, Timing
from llm_accel.eval.tasks.bench_serve.settings import BenchServeSettings
from llm_accel.eval.tasks.bench_serve.summary import summarize

WORDS = "the old dog watched a green river near the house while the doctor praised the hunter"


def make_requests(count: int, longest: int, new_tokens: int, seed: int) -> list[dict[str, Any]]:
    """Prompts of log-uniform length from 16 words to ``longest`` words, half of them streamed, a quarter sampled."""
    rng = random.Random(seed)
    requests = []
    for number in range(count):
        words = int(16 * (longest / 16) ** rng.random())
        body: dict[str, Any] = {"prompt": " ".join(rng.choices(WORDS.split(), k=words)), "max_tokens": new_tokens}
        body |= {"stream": number % 2 == 0, "seed": number, "temperature": 1.0 if number % 4 == 0 else 0.0}
        requests.append(body | {"stream_options": {"include_usage": True}} if body["stream"] else body)
    return requests


def client_of(url: str, model: str | None = None) -> ServerClient:
    """A client of the server with this address; requests may take as long as they like."""
    return ServerClient(url.rstrip("/"), BenchServeSettings(servers=(f"measured={url}",), model=model, timeout=3600.0))


async def run(url: str, requests: list[dict[str, Any]], in_flight: int, pid: int | None) -> dict[str, Any]:
    """All requests, a fixed number at a time: what came of them, the wall time, and the resident memory of process
    ``pid`` in MiB after each of them."""
    places, memory = asyncio.Semaphore(in_flight), []
    async with client_of(url) as client:

        async def one(body: dict[str, Any]) -> Timing:
            async with places:
                timing = await client.send(body, time.perf_counter())
            if pid is not None:
                memory.append(resident_mib(pid))
            return timing

        begin = time.perf_counter()
        timings = await asyncio.gather(*map(one, requests))
        return {"wall_s": time.perf_counter() - begin, "timings": timings, "memory_mib": memory}


async def read_metrics(url: str) -> list[str]:
    """The counters of the server."""
    async with client_of(url) as client:
        lines = (await client.get(url.rsplit("/v1", 1)[0] + "/metrics")).text.splitlines()
    return [line for line in lines if line and line[0] != "#" and "_bucket" not in line and "_created" not in line]


def peaks(result: dict[str, Any]) -> dict[str, Any]:
    """Throughput, latencies and outcomes; the peak of the memory in each quarter of the requests."""
    memory = result["memory_mib"]
    quarter = -(-len(memory) // 4) or 1
    quarters = [max(memory[at : at + quarter]) for at in range(0, len(memory), quarter)]
    return summarize([(result["timings"], result["wall_s"])]) | {"peak_mib_by_quarter": quarters}


def compare(requests: Sequence[dict[str, Any]], many: dict[str, Any], single: dict[str, Any]) -> dict[str, Any]:
    """The same requests in both runs: how many answers are equal, those of greedy decoding by themselves, and the gain
    in throughput."""
    equal: dict[bool, list[bool]] = {True: [], False: []}
    for body, one, other in zip(requests, many["timings"], single["timings"], strict=True):
        if one.outcome == other.outcome == OK:
            equal[body["temperature"] == 0].append(one.text == other.text)
    return {
        "compared": len(equal[True]) + len(equal[False]),
        "equal_answers": sum(equal[True]) + sum(equal[False]),
        "greedy": len(equal[True]),
        "equal_greedy": sum(equal[True]),
        "speedup": single["wall_s"] / many["wall_s"],
    }


def main() -> None:
    """Runs the load; the last line of stdout is the summary as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server (default: start one on the bundled model)")
    parser.add_argument("--method", default="snapkv:budget=256", help="of the server that is started")
    parser.add_argument("--max-batch", type=int, default=16, help="of the server that is started")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--in-flight", type=int, default=32)
    parser.add_argument(
        "--longest", type=int, default=4096, metavar="WORDS", help="longest prompt, about a token a word"
    )
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file for everything")
    args = parser.parse_args()
    requests = make_requests(args.requests, args.longest, args.new_tokens, args.seed)
    with ExitStack() as stack:
        url, pid = args.url, None
        if url is None:
            options = {"port": 0, "method": args.method, "max-batch": args.max_batch, "max-queue": args.in_flight}
            url, pid = stack.enter_context(started(options | {"deadline-s": 600}))
        many = asyncio.run(run(url, requests, args.in_flight, pid))
        single = asyncio.run(run(url, requests, 1, pid))
        metrics = asyncio.run(read_metrics(url))
    summary = {"in_flight": peaks(many), "one_at_a_time": peaks(single)} | compare(requests, many, single)
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    if args.out is not None:
        data = {**machine(), "settings": settings, "summary": summary, "metrics": metrics}
        args.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
