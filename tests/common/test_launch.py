"""Grids in several processes: the parts of one launch are one result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llm_accel.cli import main
from llm_accel.common.launch import DistributedRun, started_alone
from llm_accel.errors import LlmAccelError
from llm_accel.eval.records import RunDir
from llm_accel.eval.tasks.needle.task import NeedleTask
from llm_accel.eval.tasks.vision.task import VisionTask
from tests.eval.needle_helpers import tiny_model, tokenizer
from tests.eval.vision_helpers import save_tiny, vision

ROOT = Path(__file__).parents[2]
GRID = ["--lengths", "192,256", "--depths", "3", "--method", "dense", "--method", "snapkv:budget=64"]
OWN = ("prefill_ms", "decode_ms_per_token", "shard")  # what differs from process to process


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


def cells(path: Path, task: Any = NeedleTask) -> dict[Any, Any]:
    """Everything in the records that does not tell the time."""
    run_dir = RunDir(path, task.fields)
    records = ({key: value for key, value in record.items() if key not in OWN} for record in run_dir.records())
    return {run_dir.key(record): record for record in records}


@pytest.mark.slow
def test_two_processes_go_on_where_one_was_interrupted_and_equal_it(model: str, tmp_path: Path) -> None:
    single, both = tmp_path / "single", tmp_path / "both"
    assert main(["needle", "--model", model, *GRID, "--out", str(single)]) == 0
    both.mkdir()
    (both / "run.json").write_bytes((single / "run.json").read_bytes())
    lines = (single / "cells.jsonl").read_text().splitlines(keepends=True)
    (both / "cells.jsonl").write_text("".join(lines[:3]) + lines[3][:40])
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    script = Path(sys.executable).with_name("llm-accel")
    run = ["--main_process_port", "0", str(script), "needle", "--model", model, *GRID, "--out", str(both)]
    done = subprocess.run(
        [*launcher, *run], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["complete"] and summary == json.loads((both / "summary.json").read_text())
    assert done.stdout.count('"complete"') == 1 and done.stdout.count("snapkv:budget=64 ") == 1
    assert cells(both) == cells(single) and len(cells(both)) == len(lines)
    added = (both / "cells.jsonl").read_text().splitlines()[4:]
    assert len(added) == len(lines) - 3 and {json.loads(line)["shard"] for line in added} == {"1/2", "2/2"}
    assert {file.name for file in both.iterdir()} == {file.name for file in single.iterdir()}


def in_process(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """This process becomes one of two that wait for nobody."""
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(DistributedRun, "barrier", lambda launch: None)


def test_images_are_shared_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    path = save_tiny(tmp_path / "model")
    argv = ["--method", "dense", "--method", "random_tokens:budget=9", "--tasks", "colour,count", "--json-only"]
    assert vision(path, tmp_path / "single", *argv) == 0
    wanted = json.loads(capsys.readouterr().out)
    for rank in (1, 0):
        in_process(monkeypatch, rank)
        assert vision(path, tmp_path / "both", *argv) == 0
        printed = capsys.readouterr().out
        assert bool(printed) == (rank == 0)
    summary = json.loads(printed)
    assert cells(tmp_path / "both", VisionTask) == cells(tmp_path / "single", VisionTask)
    for entry in (wanted, summary):
        entry.pop("out")
        for row in entry["methods"].values():
            row.pop("prefill_ms")
    assert summary == wanted


def test_a_process_that_dies_leaves_no_complete_result(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def nobody_comes(run: DistributedRun) -> None:
        if (tmp_path / "cells.jsonl").exists():
            raise LlmAccelError("another process of this run ended early.")

    in_process(monkeypatch, 0)
    monkeypatch.setattr(DistributedRun, "barrier", nobody_comes)
    assert main(["needle", "--model", model, *GRID, "--out", str(tmp_path), "--no-plot"]) == 2
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert not summary["complete"] and summary["missing"] == 6
    printed = capsys.readouterr()
    assert "ended early" in printed.err and printed.out == ""


def test_parts_of_parts() -> None:
    """Two processes on each of three shards are six shards."""
    parts = [DistributedRun(rank, 2).part((index, 3)) for index in (1, 2, 3) for rank in (0, 1)]
    assert sorted(parts) == [(index, 6) for index in range(1, 7)]
    assert DistributedRun().part((2, 4)) == (2, 4)


@pytest.mark.parametrize("command", ["bench", "heads", "calibrate dyvte", "serve"])
def test_commands_that_are_one_process_say_so(command: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    in_process(monkeypatch, 1)
    assert main(command.split()) == 2
    assert f"{command.split()[0]} was started in 2 processes, but" in capsys.readouterr().err


def test_a_launcher_that_started_one_process_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert started_alone() is None
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert "--multi_gpu" in str(started_alone())
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert started_alone() is None
