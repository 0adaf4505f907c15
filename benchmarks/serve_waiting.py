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

from benchmarks.common import machine
from benchmarks.serve_load import WORDS, client_of
from benchmarks.server import started
from llm_accel.eval.tasks.bench_serve.client import OK, ServerClient, Timing
from llm_accel.eval.tasks.bench_serve.load import Planned
from llm_accel.eval.tasks.bench_serve.summary import summarize

SHORT, LONG = 16, 512  # tokens of answers
PROBES = 7  # short requests alone, and as many during the long one
MIXED = (16, 16, 16, 192)


def request(rng: random.Random, words: int, tokens: int) -> dict[str, Any]:
    """A prompt of so many words and a streamed answer of at most so many tokens."""
    prompt = " ".join(rng.choices(WORDS.split(), k=words))
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    return {"prompt": prompt, "max_tokens": tokens, "temperature": 0, **streamed}


async def head_of_line(client: ServerClient, rng: random.Random) -> dict[str, float]:
    """Median seconds of short answers alone, and of those that come one after the other during a long one."""

    async def answered(tokens: int) -> Timing:
        return await client.send(request(rng, 16, tokens), time.perf_counter())

    alone = [await answered(SHORT) for _ in range(PROBES)]
    long = asyncio.create_task(answered(LONG))
    await asyncio.sleep(2 * alone[-1].seconds)
    during = []
    while len(during) < PROBES and not long.done():
        during.append(await answered(SHORT))
    if long.done():
        during = during[:-1]
    whole = await long
    outcomes = {timing.outcome for timing in (*alone, *during, whole)}
    if outcomes != {OK} or not during or whole.new_tokens != LONG:
        raise SystemExit(
            f"the round means nothing: {outcomes}, a long answer of {whole.new_tokens} tokens, {len(during)} short "
            "ones in it."
        )
    seconds = [median(timing.seconds for timing in timings) for timings in (alone, during)]
    return {"alone_s": seconds[0], "during_s": seconds[1], "long_s": whole.seconds}


async def mixed_load(
    client: ServerClient, rng: random.Random, count: int, in_flight: int, words: int
) -> dict[str, Any]:
    """``count`` streams, three quarters of them short, a fixed number at a time."""
    bodies = [request(rng, rng.randrange(words // 2, words), MIXED[number % 4]) for number in range(count)]
    found = summarize([await client.run([Planned(None, body) for body in bodies], in_flight)])
    if found["outcomes"] != {OK: count}:
        raise SystemExit("the round means nothing: not every request was answered.")
    return {"wall_s": found["wall_s"], "tokens_per_s": found["new_tokens_per_s"], "first_s": found["first_token_s"]}


async def kept_connection(client: ServerClient, count: int = 20) -> float:
    """Median milliseconds of ``GET models`` on one connection."""
    times = []
    for _ in range(count + 1):
        begin = time.perf_counter()
        await client.get("models")
        times.append(time.perf_counter() - begin)
    return 1e3 * median(times[1:])


async def measure(servers: dict[str, str], args: argparse.Namespace) -> dict[str, dict[str, list[Any]]]:
    """All of it, in rounds, of which each asks every server the same."""
    found: dict[str, dict[str, list[Any]]] = {}
    for number in range(-1, args.rounds):  # the first is for whatever first requests pay for
        for server, url in servers.items():
            rng = random.Random(f"{args.seed}/{number}")
            async with client_of(url, args.model) as client:
                if number < 0:
                    await client.send(request(rng, 16, SHORT), time.perf_counter())
                    found[server] = {"kept_connection_ms": [], "head_of_line": [], "mixed": []}
                    continue
                kept, line = await kept_connection(client), await head_of_line(client, rng)
                load = await mixed_load(client, rng, args.requests, args.in_flight, args.words)
                for key, value in (("kept_connection_ms", kept), ("head_of_line", line), ("mixed", load)):
                    found[server][key].append(value)
    return found


def medians(result: dict[str, Any]) -> dict[str, Any]:
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
    summary = {server: medians(result) for server, result in results.items()}
    settings = {key: value for key, value in vars(args).items() if key != "out"}
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
