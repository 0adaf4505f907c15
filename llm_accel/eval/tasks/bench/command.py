"""``llm-accel bench``: speed and memory of methods, against dense and against what the machine can do."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llm_accel.common.environment import hardware, versions
from llm_accel.common.launch import DistributedRun
from llm_accel.common.loading import find_device, load_text_model
from llm_accel.eval.cost import ModelCost
from llm_accel.eval.plots import require_matplotlib, save
from llm_accel.eval.records import reported_errors
from llm_accel.eval.runner import print_summary
from llm_accel.eval.tasks.bench.bounds import measure_bounds
from llm_accel.eval.tasks.bench.compare import TOLERANCE, SlowerError, check, load, render_comparison
from llm_accel.eval.tasks.bench.memory import PeakMemory
from llm_accel.eval.tasks.bench.plot import draw
from llm_accel.eval.tasks.bench.runner import run_cells
from llm_accel.eval.tasks.bench.settings import BenchRunOptions, BenchSettings
from llm_accel.eval.tasks.bench.shapes import build, shape_config
from llm_accel.eval.tasks.bench.table import render


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of settings and run."""
    BenchSettings.add_arguments(parser)
    BenchRunOptions.add_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Measures, writes bench.json and bench.png, prints the table and one JSON line, and returns that.

    Raises:
        LlmAccelError: anything wrong with the arguments, before anything is run or written.
        SlowerError: with ``--check``, a ratio fell.
    """
    how = BenchRunOptions.from_arguments(args)
    if how.compare:
        print(render_comparison(*(load(path) for path in how.compare)))
        return None
    kept = load(how.check) if how.check else None
    settings = BenchSettings.from_arguments(args) if kept is None else BenchSettings.from_dict(kept["settings"])
    if how.plot:
        require_matplotlib()
    result = measure(settings)
    folder = Path(how.out or f"runs/bench-{Path(settings.model).name if settings.model else settings.shape}")
    with reported_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "bench.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if how.plot:
        save(folder / "bench.png", draw(result))
    line = {"command": "bench", "out": str(folder), "cells": [_brief(cell) for cell in result["cells"]]}
    print_summary(line, None if how.json_only else render(result))
    failures = [] if kept is None else check(kept, result)
    if failures:
        raise SlowerError("\n  ".join([f"slower than {how.check} by more than {TOLERANCE:.0%}:", *failures]))
    return line


def measure(settings: BenchSettings) -> dict[str, Any]:
    """The whole result as plain data: settings as resolved, conditions, bounds and cells."""
    model, settings = _model(settings)
    work, bounds = ModelCost.of(model), measure_bounds(model.device, model.dtype)
    before = os.getloadavg()
    with torch.no_grad():
        cells, failed = run_cells(settings, model, bounds, DistributedRun().log)
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
        "failed": failed,
    }


def _model(settings: BenchSettings) -> tuple[Any, BenchSettings]:
    if settings.model is not None:
        model, _, settings = load_text_model(settings)
        return model, settings
    assert settings.shape is not None
    device = find_device(settings.device)
    automatic = torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype = automatic if settings.dtype == "auto" else getattr(torch, settings.dtype)
    model = build(shape_config(settings.shape, settings.changes), dtype, device, settings.attn, settings.seed)
    return model, replace(settings, device=str(model.device), dtype=str(model.dtype).removeprefix("torch."))


def _brief(cell: dict[str, Any]) -> dict[str, Any]:
    """One cell for the last line of stdout."""
    names = ("name", "length", "batch", "tokens_per_s", "decode_speedup", "speedup_share", "first_token_speedup")
    figures = {"first_token_ms": cell["first_token_ms"]["median"], "decode_ms": cell["decode_ms"]["median"]}
    return {name: cell[name] for name in names} | figures | {"kv_bytes": cell["kv_bytes"]}
