"""kvpress on the same token ids: ``make kvpress``, or ``python -m benchmarks.peers.kvpress --peer-python PYTHON``.

Needles in prompts of ``llm-accel needle``, found or not by each method of ``rows.py`` at equal shares of the entries
kept, here and in kvpress, which runs in an environment of its own (it needs an older transformers). Both sides decode
greedily from the same ids, in the same dtype, on one machine. ``read_s`` is the median time until the answer begins:
prefill, compression and, where it follows, the question. On our side all shares of KVzip use one second reading of the
context, so that ``read_s`` of its largest share alone holds it whole. Records are appended to ``--out``, so that a run
goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks.common import machine, publish
from benchmarks.peers.kvpress.rows import Row, rows
from llm_accel.common.arguments import ModelOptions
from llm_accel.common.checkpoints import resolve_model
from llm_accel.common.generation import cache_bytes
from llm_accel.common.loading import load_text_model
from llm_accel.common.statistics import wilson
from llm_accel.eval.engine import TextEngine
from llm_accel.eval.grid import points
from llm_accel.eval.prompts.grammar import exact_match
from llm_accel.eval.prompts.maker import TextPrompt
from llm_accel.eval.tasks.needle.settings import NeedleSettings, parse_depths
from llm_accel.eval.tasks.needle.task import NeedleMaker
from llm_accel.patches.cache_name import CACHE
from llm_accel.registry import parse_all

THEIRS = Path(__file__).with_name("theirs.py")
WAYS = {False: "query-aware", True: "query-agnostic"}
Record = dict[str, Any]


def make_prompts(options: argparse.Namespace, tokenizer: Any) -> dict[str, TextPrompt]:
    """Prompts by name."""
    made = {}
    for task in options.tasks:
        settings = NeedleSettings(
            task=task,
            lengths=tuple(options.lengths),
            depths=parse_depths("5"),
            samples=options.samples,
            seed=options.seed,
        )
        maker = NeedleMaker.load(settings, tokenizer)
        for point in points(settings.lengths, settings.depths, settings.samples):
            made[f"{task} {point.length} {point.row:g} {point.sample}"] = maker.make(point)
    return made


def ours(engines: dict[bool, TextEngine], prompts: dict[str, TextPrompt], some: Sequence[Row], out: Path) -> None:
    """Our records of what is lacking, appended to ``out``."""
    done = {(record["prompt"], record["agnostic"], record["row"]) for record in read(out)}
    with out.open("a") as file:
        for name, prompt in prompts.items():
            for row in some:
                if (name, row.agnostic, row.name) in done:
                    continue
                outcome = engines[row.agnostic].run([prompt], parse_all(row.name))
                held = outcome.dense_kv_bytes if outcome.prompt_bytes is None else outcome.prompt_bytes[0]
                record = {"prompt": name, "agnostic": row.agnostic, "row": row.name, "tokens": outcome.answers[0]}
                print(
                    json.dumps(record | {"kv_bytes": held, "seconds": outcome.prefill_ms / 1e3}), file=file, flush=True
                )


def theirs(options: argparse.Namespace, job: dict[str, Any], out: Path) -> None:
    """kvpress' records, by its own interpreter."""
    file = options.out / "job.json"
    file.write_text(json.dumps(job))
    subprocess.run([options.peer_python, str(THEIRS), str(file), str(out)], check=True)


def read(path: Path) -> list[Record]:
    """Records so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def summarize(
    sides: dict[str, list[Record]], prompts: dict[str, TextPrompt], decode: Any, token: float
) -> list[Record]:
    """For each way, task, length and row: needles found, interval, bytes held of those of all entries and time, on both
    sides; ``token``: bytes of one token's entries."""
    table = []
    for agnostic in WAYS:
        for group in dict.fromkeys(name.rsplit(" ", 2)[0] for name in prompts):
            own = {
                side: [r for r in some if r["agnostic"] is agnostic and r["prompt"].rsplit(" ", 2)[0] == group]
                for side, some in sides.items()
            }
            task, length = group.split(" ")
            for row in dict.fromkeys(r["row"] for some in own.values() for r in some):
                entry = {"way": WAYS[agnostic], "task": task, "length": int(length), "row": row}
                found = {side: [r for r in some if r["row"] == row] for side, some in own.items()}
                table.append(entry | {side: cell(some, prompts, decode, token) for side, some in found.items()})
    return table


def cell(records: Sequence[Record], prompts: dict[str, TextPrompt], decode: Any, token: float) -> Record | None:
    """What one side did in one row. Of dense, bytes are those of all entries."""
    if not records:
        return None
    hits = sum(exact_match(decode(r["tokens"]), prompts[r["prompt"]].expected, "number") for r in records)
    whole = sum(token * len(prompts[r["prompt"]].ids) for r in records)
    held = 1.0 if records[0]["row"] == "dense" else sum(r["kv_bytes"] for r in records) / whole
    return {
        "found": int(hits),
        "of": len(records),
        "ci95": [round(end, 3) for end in wilson(hits, len(records))],
        "held": round(held, 4),
        "read_s": round(median(r["seconds"] for r in records), 3),
    }


@torch.inference_mode()
def token_bytes(model: Any) -> float:
    """Bytes of the entries of one token in all layers."""
    cache = DynamicCache(config=model.config)
    model(torch.zeros(1, 8, dtype=torch.long), **{CACHE: cache})
    return cache_bytes(cache) / 8


def peer_versions(python: str) -> dict[str, str]:
    """Versions in the peer's environment."""
    code = (
        "import importlib.metadata as m, json; "
        "print(json.dumps({n: m.version(n) for n in ('kvpress', 'transformers', 'torch')}))"
    )
    return dict(json.loads(subprocess.check_output([python, "-c", code], text=True)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what is lacking, then publishes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.kvpress", description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", default="build/kvpress/bin/python", help="an interpreter with kvpress")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tasks", nargs="+", default=["single", "multikey"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024])
    parser.add_argument("--samples", type=int, default=4, help="prompts at each of five depths")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS.values()), default=list(WAYS.values()))
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/kvpress"))
    parser.add_argument("--publish", type=Path)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    given = ModelOptions(model=options.model, dtype=options.dtype, device="cpu")
    model, tokenizer, _ = load_text_model(given)
    prompts = make_prompts(options, tokenizer)
    some = [row for way, name in WAYS.items() if name in options.ways for row in rows(way)]
    engines = {way: TextEngine(model, tokenizer, way, shared=True) for way in WAYS}
    files = {side: options.out / f"{side}.jsonl" for side in ("llm_accel", "kvpress")}
    ours(engines, prompts, some, files["llm_accel"])
    job = {
        "model": resolve_model(options.model),
        "dtype": options.dtype,
        "ends": sorted(engines[False].ends),
        "rows": [dataclasses.asdict(row) for row in some],
        "prompts": list(_described(prompts)),
    }
    token = token_bytes(model)
    del model, engines  # two models would have to fit into memory
    theirs(options, job, files["kvpress"])
    sides = {side: [r for r in read(file) if r["prompt"] in prompts] for side, file in files.items()}

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode([t for t in tokens if t not in job["ends"]], skip_special_tokens=True))

    about = {"peer": peer_versions(options.peer_python), "model": options.model, "dtype": options.dtype}
    publish(
        {**machine(), **about, "seed": options.seed, "rows": summarize(sides, prompts, decode, token)}, options.publish
    )


def _described(prompts: dict[str, TextPrompt]) -> Iterator[dict[str, Any]]:
    for name, p in prompts.items():
        yield {"name": name, "ids": p.ids, "context_length": p.context_length, "new_tokens": p.new_tokens}


if __name__ == "__main__":
    main()
