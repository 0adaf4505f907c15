"""``llm-accel bench``: arguments, and the run from arguments to result."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llm_accel.common.arguments import add_methods, add_place, add_shown, canonical_methods
from llm_accel.common.environment import hardware, versions
from llm_accel.common.loading import find_device
from llm_accel.errors import ConfigError
from llm_accel.eval.plots import require_matplotlib
from llm_accel.eval.tasks.bench import settings as b
from llm_accel.eval.tasks.bench.bounds import Work, measure_bounds
from llm_accel.eval.tasks.bench.compare import TOLERANCE, SlowerError, check, load, render_comparison
from llm_accel.eval.tasks.bench.memory import PeakMemory
from llm_accel.eval.tasks.bench.plot import write as write_plot
from llm_accel.eval.tasks.bench.runner import run_cells
from llm_accel.eval.tasks.bench.settings import Settings
from llm_accel.eval.tasks.bench.shapes import SHAPES, build, shape_config
from llm_accel.eval.tasks.bench.table import render
from llm_accel.eval.tasks.needle import settings as s
from llm_accel.eval.tasks.needle.loading import load_model
from llm_accel.patches.plan import DECODES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command; values are checked later, in :class:`Settings`."""
    parser.add_argument("--model", metavar="ID|PATH", help="HuggingFace text model, instead of a shape")
    parser.add_argument(
        "--shape", metavar="|".join(SHAPES), help=f"geometry with random weights (default: {b.DEFAULT_SHAPE})"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="changes",
        help="repeatable; overrides one number of the shape, for example num_hidden_layers=8",
    )
    add_methods(parser, f"dense always runs too (default: {' '.join(b.DEFAULT_METHODS[1:])})")
    parser.add_argument(
        "--decode",
        action="append",
        metavar="|".join(DECODES),
        dest="decodes",
        help="repeatable; with compiled, the static cache of transformers runs too, compiled (default: eager)",
    )
    parser.add_argument("--lengths", default="1k,4k", metavar="LIST", help="prompt lengths (default: %(default)s)")
    parser.add_argument("--batch", default="1", metavar="LIST", help="rows per call (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--memory-limit", metavar="SIZE", help="work out the largest batch within it, e.g. 80GiB")
    parser.add_argument("--probe", action="store_true", help="try the largest batch out, too")
    add_place(parser, "the checkpoint's; shapes: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="weights and prompts (default: %(default)s)")
    out = parser.add_argument_group("output")
    out.add_argument("--out", metavar="DIR", help="where bench.json and bench.png go (default: runs/bench-<shape>)")
    add_shown(out, "bench.png")
    other = parser.add_argument_group("results that exist")
    other.add_argument("--compare", nargs=2, metavar=("A.json", "B.json"), help="print two results side by side")
    other.add_argument(
        "--check",
        metavar="RESULT.json",
        help=f"measure again; exit code 2 if a ratio to dense fell by more than {100 * TOLERANCE:.0f} %%",
    )


def settings_from(args: argparse.Namespace) -> Settings:
    """Checked settings; raises :class:`ConfigError` or another :class:`llm_accel.LlmAccelError`."""
    shape = args.shape if args.model or args.shape else b.DEFAULT_SHAPE
    methods = canonical_methods(args.methods or b.DEFAULT_METHODS)
    return Settings(
        model=args.model,
        shape=shape,
        changes=tuple(args.changes),
        methods=b.with_dense(methods),
        decodes=tuple(dict.fromkeys(["eager", *(args.decodes or [])])),
        lengths=s.parse_lengths(args.lengths),
        batches=b.parse_batches(args.batch),
        new_tokens=args.new_tokens,
        rounds=args.rounds,
        memory_limit=None if args.memory_limit is None else b.parse_bytes(args.memory_limit),
        probe=args.probe,
        dtype=args.dtype,
        device=args.device,
        attn=args.attn,
        seed=args.seed,
    )


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Measures, writes bench.json and bench.png, prints the table and one JSON line, and returns that.

    Raises:
        LlmAccelError: anything wrong with the arguments, before anything is run or written.
        SlowerError: with ``--check``, a ratio fell.
    """
    if args.compare:
        print(render_comparison(*(load(path) for path in args.compare)))
        return None
    kept = load(args.check) if args.check else None
    settings = settings_from(args) if kept is None else Settings.from_dict(kept["settings"])
    if args.plot:
        require_matplotlib()
    result = measure(settings)
    folder = Path(args.out or f"runs/bench-{Path(settings.model).name if settings.model else settings.shape}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "bench.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {str(folder)!r} cannot be used: {error.strerror or error}.") from error
    if args.plot:
        write_plot(folder / "bench.png", result)
    if not args.json_only:
        print(render(result))
    line = {"command": "bench", "out": str(folder), "cells": [_brief(cell) for cell in result["cells"]]}
    print(json.dumps(line, separators=(",", ":")), flush=True)
    failures = [] if kept is None else check(kept, result)
    if failures:
        raise SlowerError("\n  ".join([f"slower than {args.check} by more than {TOLERANCE:.0%}:", *failures]))
    return line


def measure(settings: Settings) -> dict[str, Any]:
    """The whole result as plain data: settings as they came out, conditions, bounds and cells."""
    model, settings = _model(settings)
    work, bounds = Work.of(model), measure_bounds(model.device, model.dtype)
    before = os.getloadavg()
    with torch.no_grad():
        cells = run_cells(settings, model, bounds, _say)
    return {
        "command": "bench",
        "settings": settings.to_dict(),
        "versions": versions(),
        "hardware": hardware(model.device) | {"load_before": before, "load_after": os.getloadavg()},
        "model": {"parameters": sum(p.numel() for p in model.parameters()), "weight_bytes": work.weight_bytes},
        "bounds": bounds.to_dict(),
        "memory_source": PeakMemory(model.device, work.weight_bytes).source,
        "argv": sys.argv[1:],
        "cells": cells,
    }


def _model(settings: Settings) -> tuple[Any, Settings]:
    if settings.model is None:
        assert settings.shape is not None
        device = find_device(settings.device)
        automatic = torch.float32 if device.type == "cpu" else torch.bfloat16
        dtype = automatic if settings.dtype == "auto" else getattr(torch, settings.dtype)
        model = build(shape_config(settings.shape, settings.changes), dtype, device, settings.attn, settings.seed)
    else:
        asked = s.Settings(model=settings.model, dtype=settings.dtype, device=settings.device, attn=settings.attn)
        model, _, _ = load_model(asked)
    return model, replace(settings, device=str(model.device), dtype=str(model.dtype).removeprefix("torch."))


def _brief(cell: dict[str, Any]) -> dict[str, Any]:
    """One cell for the last line of stdout."""
    names = ("name", "length", "batch", "tokens_per_s", "decode_speedup", "speedup_share", "first_token_speedup")
    figures = {"first_token_ms": cell["first_token_ms"]["median"], "decode_ms": cell["decode_ms"]["median"]}
    return {name: cell[name] for name in names} | figures | {"kv_bytes": cell["kv_bytes"]}


def _say(text: str) -> None:
    print(text, file=sys.stderr)
