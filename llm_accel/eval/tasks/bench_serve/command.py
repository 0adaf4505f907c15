"""``llm-accel bench serve``: load on OpenAI-compatible servers, side by side."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from llm_accel.common.environment import packages
from llm_accel.eval.records import reported_errors
from llm_accel.eval.runner import print_summary
from llm_accel.eval.tasks.bench_serve.client import OK, ServerClient
from llm_accel.eval.tasks.bench_serve.load import make_load
from llm_accel.eval.tasks.bench_serve.settings import BenchServeSettings
from llm_accel.eval.tasks.bench_serve.summary import Round, render, summarize


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the settings, and where the result goes."""
    BenchServeSettings.add_arguments(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="FILE", help="JSON file for everything, each request included")
    output.add_argument("--json-only", action="store_true", help="print only the JSON line, no table")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Sends the load to every server, prints the table and one JSON line, and returns that.

    Raises:
        ConfigError: anything wrong with the arguments, or a server that cannot be reached.
    """
    settings = BenchServeSettings.from_arguments(args)
    rounds = asyncio.run(measure(settings))
    servers = {name: summarize(found) for name, found in rounds.items()}
    if args.out:
        result = {
            "command": "bench serve",
            "settings": settings.to_dict(),
            "versions": packages(),
            "argv": sys.argv[1:],
            "servers": servers,
            "rounds": {name: [_plain(one) for one in found] for name, found in rounds.items()},
        }
        with reported_errors(Path(args.out)):
            Path(args.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    line = {"command": "bench serve", "servers": servers}
    print_summary(line, None if args.json_only else render(servers))
    return line


async def measure(settings: BenchServeSettings) -> dict[str, list[Round]]:
    """Every round of every server, by its name. Servers take turns, so that a busy minute of the machine meets all."""
    load = make_load(settings)
    first = make_load(replace(settings, requests=settings.warmup, seed=settings.seed + 1)) if settings.warmup else []
    found: dict[str, list[Round]] = {name: [] for name in settings.addresses}
    async with AsyncExitStack() as stack:
        servers = {
            n: await stack.enter_async_context(ServerClient(url, settings)) for n, url in settings.addresses.items()
        }
        for server in servers.values():
            await server.run([replace(planned, at=None) for planned in first], 1)
        for name in [*servers] * settings.rounds:
            timings, wall = await servers[name].run(load, settings.in_flight)
            found[name].append((timings, wall))
            ended = sum(timing.outcome == OK for timing in timings)
            print(f"{name}: {ended} of {len(load)} requests in {wall:.1f} s", file=sys.stderr)
    return found


def _plain(one: Round) -> dict[str, Any]:
    timings, wall = one
    return {"wall_s": wall, "requests": [timing.to_dict() for timing in timings]}
