"""Load on a server: many completions of mixed length, first many in flight, then the same ones one at a time. Outcomes,
equality of the answers, throughput, latency, memory of the server and its metrics as JSON.

python -m benchmarks.serve_load --out load.json                    # starts llm-accel serve on the bundled model
python -m benchmarks.serve_load --url http://127.0.0.1:8000/v1     # a server that runs; key in LLM_ACCEL_API_KEY
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from benchmarks.common import machine, resident_mib
from benchmarks.server import started

NO_END = "no [DONE]"  # a whole stream without the line that ends it, as transformers serve sends it
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


async def send(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    """One request to its end: outcome, answer, times in seconds, tokens."""
    begin, first, usage, outcome, answer = time.perf_counter(), None, {}, "ok", ""
    try:
        async with client.stream("POST", "completions", json=body) as response:
            lines = [line async for line in _timed(response)]
        first = lines[0][0] - begin if lines else None
        if response.status_code != 200:
            outcome = str(response.status_code)
        elif body["stream"]:
            events = [json.loads(text[6:]) for _, text in lines if text.startswith("data: {")]
            usage = events[-1].get("usage") or {}
            answer = "".join(choice["text"] for event in events for choice in event.get("choices", ()))
            if lines[-1][1] != "data: [DONE]":
                outcome = "broken stream" if "error" in events[-1] or not usage else NO_END
        else:
            whole = json.loads("".join(text for _, text in lines))
            usage, answer = whole["usage"], whole["choices"][0]["text"]
    except httpx.HTTPError as error:
        outcome = type(error).__name__
    return {
        "outcome": outcome,
        "answer": answer,
        "seconds": time.perf_counter() - begin,
        "first_s": first if body["stream"] else None,
        "prompt_tokens": usage.get("prompt_tokens", 0),
        "completion_tokens": usage.get("completion_tokens", 0),
    }


async def _timed(response: httpx.Response) -> Any:
    async for line in response.aiter_lines():
        if line:
            yield time.perf_counter(), line


async def run(url: str, requests: list[dict[str, Any]], in_flight: int, pid: int | None) -> dict[str, Any]:
    """All requests, a fixed number at a time: what came of them, the wall time, and the resident memory of process
    ``pid`` in MiB after each of them."""
    places, memory = asyncio.Semaphore(in_flight), []
    async with make_client(url) as client:
        name = (await client.get("models")).raise_for_status().json()["data"][0]["id"]

        async def one(body: dict[str, Any]) -> dict[str, Any]:
            async with places:
                record = await send(client, {"model": name} | body)
            if pid is not None:
                memory.append(resident_mib(pid))
            return record

        begin = time.perf_counter()
        records = await asyncio.gather(*map(one, requests))
        return {"wall_s": time.perf_counter() - begin, "records": records, "memory_mib": memory}


async def read_metrics(url: str) -> list[str]:
    """The counters of the server."""
    async with make_client(url) as client:
        lines = (await client.get(url.rsplit("/v1", 1)[0] + "/metrics")).text.splitlines()
    return [line for line in lines if line and line[0] != "#" and "_bucket" not in line and "_created" not in line]


def make_client(url: str) -> httpx.AsyncClient:
    """A client of the server, with its key if there is one."""
    headers = {"Authorization": f"Bearer {os.environ.get('LLM_ACCEL_API_KEY', 'none')}"}
    return httpx.AsyncClient(base_url=url.rstrip("/") + "/", headers=headers, timeout=None)


def summarize(result: dict[str, Any]) -> dict[str, Any]:
    """Throughput, latencies and outcomes; the peak of the memory in each quarter of the requests."""
    records, wall, memory = result["records"], result["wall_s"], result["memory_mib"]
    done = [record for record in records if record["outcome"] == "ok"]
    quarter = -(-len(memory) // 4) or 1
    return {
        "outcomes": dict(Counter(record["outcome"] for record in records)),
        "wall_s": wall,
        "requests_per_s": len(done) / wall,
        "generated_tokens_per_s": sum(record["completion_tokens"] for record in done) / wall,
        "prompt_tokens_per_s": sum(record["prompt_tokens"] for record in done) / wall,
        "seconds": quantiles([record["seconds"] for record in done]),
        "first_s": quantiles([record["first_s"] for record in done if record["first_s"] is not None]),
        "peak_mib_by_quarter": [max(memory[at : at + quarter]) for at in range(0, len(memory), quarter)],
    }


def compare(many: dict[str, Any], single: dict[str, Any]) -> dict[str, Any]:
    """The same requests in both runs: how many answers are equal, and the gain in throughput."""
    pairs = [
        (one, other)
        for one, other in zip(many["records"], single["records"], strict=True)
        if one["outcome"] == other["outcome"] == "ok"
    ]
    return {
        "compared": len(pairs),
        "equal_answers": sum(one["answer"] == other["answer"] for one, other in pairs),
        "speedup": single["wall_s"] / many["wall_s"],
    }


def quantiles(values: list[float]) -> dict[str, float]:
    """The median and two tails; empty without values."""
    ordered = sorted(values)
    return {f"p{q}": ordered[min(len(ordered) - 1, len(ordered) * q // 100)] for q in (50, 95, 99) if ordered}


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
    summary = {"in_flight": summarize(many), "one_at_a_time": summarize(single)} | compare(many, single)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    if args.out is not None:
        data = {**machine(), "settings": settings, "summary": summary, "metrics": metrics}
        args.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
