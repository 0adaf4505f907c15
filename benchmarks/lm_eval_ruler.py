"""RULER's prompts through lm-evaluation-harness and through ``llm-accel ruler``: the same answers on a real checkpoint.

    pip install -e ".[lm-eval]" && python -m benchmarks.real
    python -m benchmarks.lm_eval_ruler --out benchmarks/results/lm_eval_ruler.json

Both sides get the same samples, decode greedily in fp32, and say for each method what it scores; ``equal`` counts the
answers that are the same, up to the spaces around them. Prompts that the tokenizer would read otherwise from text than
they were made (``same_tokens``) are left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.common import machine, publish

TASKS = ("niah_single_1", "niah_multikey_1")
METHODS = ("dense", "snapkv:ratio=0.25", "kvzip:ratio=0.25")


def command(*arguments: str) -> None:
    """One command of ours, as a user calls it."""
    subprocess.run([sys.executable, "-m", "llm_accel", *arguments], check=True)


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def ours(args: argparse.Namespace, prompts: Sequence[str], folder: Path) -> dict[str, dict[str, list[Any]]]:
    """Answers and scores by method and sample."""
    methods = [part for method in args.method for part in ("--method", method)]
    command("ruler", *prompts, *methods, "--no-plot", "--out", str(folder))
    found: dict[str, dict[str, list[Any]]] = {method: {} for method in args.method}
    for cell in lines(folder / "cells.jsonl"):
        found[cell["method"]][name(cell["task"], cell["sample"])] = [cell["answer"].strip(), cell["score"]]
    return found


def theirs(args: argparse.Namespace, method: str, samples: Path, folder: Path) -> dict[str, list[Any]]:
    """The same through the harness."""
    chosen = [] if method == "dense" else ["--method", method]
    model = f"pretrained={args.model},dtype=float32"
    data = ["--metadata", json.dumps({"samples": str(samples)}), "--tasks", "llm_accel_ruler_niah"]
    log = ["--output_path", str(folder), "--log_samples", "--batch_size", "1"]
    command("lm-eval", "--model_args", model, *chosen, *data, *log)
    records = [record for file in folder.rglob("samples_*.jsonl") for record in lines(file)]
    return {name(r["doc"]["task"], r["doc"]["index"]): [r["resps"][0][0].strip(), r["score"]] for r in records}


def name(task: str, index: int) -> str:
    """Of a sample, the same on both sides."""
    return f"{task} {index}"


def main() -> None:
    """Runs both sides, writes one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--method", action="append", help=f"repeatable (default: {' '.join(METHODS)})")
    parser.add_argument("--length", default="1k")
    parser.add_argument("--samples", type=int, default=5, help="of each task")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.method = args.method or list(METHODS)
    asked = ["--model", args.model, "--dtype", "float32", "--tasks", ",".join(TASKS), "--lengths", args.length]
    asked += ["--samples", str(args.samples), "--no-chat-template"]
    with tempfile.TemporaryDirectory() as place:
        samples, own = Path(place, "samples.jsonl"), Path(place, "own")
        command("ruler", *asked, "--write-samples", str(samples))
        same = {name(sample["task"], sample["index"]) for sample in lines(samples) if sample["same_tokens"]}
        here, rows = ours(args, asked, own), {}
        for number, method in enumerate(args.method):
            there = theirs(args, method, samples, Path(place, str(number)))
            rows[method] = {
                "samples": len(same),
                "ours": fmean(float(here[method][key][1]) for key in same),
                "harness": fmean(float(there[key][1]) for key in same),
                "equal": sum(here[method][key][0] == there[key][0] for key in same),
            }
    result = {**machine(), "lm_eval": version("lm_eval"), "model": args.model, "dtype": "float32"}
    publish(result | {"tasks": TASKS, "length": args.length, "methods": rows}, args.out)


if __name__ == "__main__":
    main()
