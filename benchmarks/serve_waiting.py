"""How long requests wait for each other: a short one alone and during a long answer, a mixed load of streams, and
what a kept connection costs. Figures as JSON.

python -m benchmarks.serve_waiting --out waiting.json              # starts llm-accel serve on the bundled model
python -m benchmarks.serve_waiting --url http://127.0.0.1:8000/v1  # any server with OpenAI's API
python -m benchmarks.serve_waiting --beside transformers=http://127.0.0.1:8001/v1  # another one in the same rounds
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from benchmarks.common import machine
from benchmarks.serve_load import NO_END, WORDS, make_client, quantiles, send
from benchmarks.server import started

SHORT, LONG = 16, 512  # tokens of answers
PROBES = 7  # short requests alone, and as many during the long one
ANSWERED = {"ok", NO_END}
MIXED = (16, 16, 16, 192)


def request(rng: random.Random, words: int, tokens: int, stream: bool = True) -> dict[str, Any]:
    """A prompt of so many words and an answer of at most so many tokens."""
    prompt = " ".join(rng.choices(WORDS.split(), k=words))
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": tokens, "temperature": 0}
    return body | ({"stream": True, "stream_options": {"include_usage": True}} if stream else {"stream": False})


async def head_of_line(client: httpx.AsyncClient, name: dict[str, str], rng: random.Random) -> dict[str, float]:
    """Median seconds of short answers alone, and of those that come one after the other during a long one."""
    alone = [await send(client, name | request(rng, 16, SHORT)) for _ in range(PROBES)]
    long = asyncio.create_task(send(client, name | request(rng, 16, LONG)))
    await asyncio.sleep(2 * alone[-1]["seconds"])
    during = []
    while len(during) < PROBES and not long.done():
        during.append(await send(client, name | request(rng, 16, SHORT)))
    if long.done():
        during = during[:-1]
    whole = await long
    outcomes, tokens = {record["outcome"] for record in (*alone, *during, whole)}, whole["completion_tokens"]
    if not outcomes <= ANSWERED or not during or tokens != LONG:
        raise SystemExit(
            f"the round means nothing: {outcomes}, a long answer of {tokens} tokens, {len(during)} short ones in it."
        )
    seconds = [median(record["seconds"] for record in records) for records in (alone, during)]
    return {"alone_s": seconds[0], "during_s": seconds[1], "long_s": whole["seconds"]}


async def mixed_load(
    client: httpx.AsyncClient, name: dict[str, str], rng: random.Random, count: int, in_flight: int, words: int
) -> dict[str, Any]:
    """``count`` streams, three quarters of them short, a fixed number at a time."""
    places = asyncio.Semaphore(in_flight)
    bodies = [request(rng, rng.randrange(words // 2, words), MIXED[number % 4]) for number in range(count)]

    async def one(body: dict[str, Any]) -> dict[str, Any]:
        async with places:
            return await send(client, name | body)

    begin = time.perf_counter()
    records = await asyncio.gather(*map(one, bodies))
    wall = time.perf_counter() - begin
    if not {record["outcome"] for record in records} <= ANSWERED:
        raise SystemExit("the round means nothing: not every request was answered.")
    tokens = sum(record["completion_tokens"] for record in records)
    first = quantiles([record["first_s"] for record in records])
    return {"wall_s": wall, "tokens_per_s": tokens / wall, "first_s": first}


async def kept_connection(client: httpx.AsyncClient, count: int = 20) -> float:
    """Median milliseconds of ``GET models`` on one connection."""
    times = []
    for _ in range(count + 1):
        begin = time.perf_counter()
        (await client.get("models")).raise_for_status()
        times.append(time.perf_counter() - begin)
    return 1e3 * median(times[1:])


async def measure(servers: dict[str, str], args: argparse.Namespace) -> dict[str, dict[str, list[Any]]]:
    """All of it, in rounds, of which each asks every server the same."""
    found: dict[str, dict[str, list[Any]]] = {}
    for number in range(-1, args.rounds):  # the first is for whatever first requests pay for
        for server, url in servers.items():
            rng = random.Random(f"{args.seed}/{number}")
            async with make_client(url) as client:
                served = (await client.get("models")).raise_for_status().json()["data"]
                name = {"model": args.model or served[0]["id"]}
                if number < 0:
                    await send(client, name | request(rng, 16, SHORT))
                    found[server] = {"kept_connection_ms": [], "head_of_line": [], "mixed": []}
                    continue
                kept, line = await kept_connection(client), await head_of_line(client, name, rng)
                load = await mixed_load(client, name, rng, args.requests, args.in_flight, args.words)
                for key, value in (("kept_connection_ms", kept), ("head_of_line", line), ("mixed", load)):
                    found[server][key].append(value)
    return found


def summarize(result: dict[str, Any]) -> dict[str, Any]:
    """Medians over the rounds."""

    def over(rows: Sequence[dict[str, Any]], key: str) -> float:
        return median(row[key] for row in rows)

    lines, mixed = result["head_of_line"], result["mixed"]
    return {
        "kept_connection_ms": median(result["kept_connection_ms"]),
        **{key: over(lines, key) for key in ("alone_s", "during_s", "long_s")},
        "ratio": median(row["during_s"] / row["alone_s"] for row in lines),
        "tokens_per_s": over(mixed, "tokens_per_s"),
        "first_s": {q: median(row["first_s"][q] for row in mixed) for q in ("p50", "p95")},
    }


def main() -> None:
    """Measures; the last line of stdout is the summary as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server (default: start one on the bundled model)")
    parser.add_argument("--beside", action="append", default=[], metavar="NAME=URL", help="measured in the same rounds")
    parser.add_argument("--model", help="what requests call it (default: the first one that the server lists)")
    parser.add_argument("--method", default="snapkv:budget=256", help="of the server that is started")
    parser.add_argument("--max-batch", type=int, default=16, help="of the server that is started")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--in-flight", type=int, default=8)
    parser.add_argument("--words", type=int, default=64, help="longest prompt of the mixed load, about a token a word")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file for everything")
    args = parser.parse_args()
    with ExitStack() as stack:
        url = args.url
        if url is None:
            options = {"port": 0, "method": args.method, "max-batch": args.max_batch}
            url, _ = stack.enter_context(started(options))
        servers = {"measured": url} | dict(other.split("=", 1) for other in args.beside)
        results = asyncio.run(measure(servers, args))
    summary = {server: summarize(result) for server, result in results.items()}
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    if args.out is not None:
        data = {
            **machine(),
            "settings": settings,
            "load_average": os.getloadavg(),
            "summary": summary,
            "rounds": results,
        }
        args.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
