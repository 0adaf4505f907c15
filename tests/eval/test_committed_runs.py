"""Committed runs (benchmarks/results) can be continued: their settings are understood, their prompts are made again."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from llm_accel.assets import NEEDLE
from llm_accel.common.checkpoints import CHECKPOINTS, checkpoint_path, is_fetched
from llm_accel.eval.tasks.leaderboard.settings import LeaderboardSettings
from llm_accel.eval.tasks.leaderboard.task import LeaderboardTask
from llm_accel.eval.tasks.needle.settings import NeedleSettings
from llm_accel.eval.tasks.needle.task import NeedleMaker, NeedleTask
from llm_accel.eval.tasks.ruler.task import RulerMaker
from llm_accel.eval.tasks.vision.settings import VisionSettings
from llm_accel.eval.tasks.vision.task import VisionTask, make_source

ROOT = Path(__file__).parents[2] / "benchmarks" / "results"
FILES = sorted(ROOT.rglob("run.json"))
HASHES = ("prompt_hash", "weights_hash")


def tokenizer_of(model: str | None) -> Any:
    """The tokenizer of a run's model; skips where that is a checkpoint that has not been fetched."""
    if model in CHECKPOINTS and not is_fetched(checkpoint_path(model)):
        pytest.skip(f"{model} has not been fetched (make real), and its tokenizer makes the prompts")
    return AutoTokenizer.from_pretrained(NEEDLE if model is None else checkpoint_path(model), local_files_only=True)


@cache
def needle_digest(text: str) -> str:
    settings = NeedleSettings.from_dict(json.loads(text))
    maker = NeedleMaker.load(settings, tokenizer_of(settings.model))
    assert maker.settings == settings
    return maker.digest(settings.lengths, settings.depths)


@cache
def board_digest(text: str) -> str:
    settings = LeaderboardSettings.from_dict(json.loads(text))
    maker = RulerMaker.load(settings, tokenizer_of(settings.model))
    assert maker.settings == settings
    return maker.digest(settings.lengths, settings.rows)


def vision_digest(text: str) -> str:
    return make_source(VisionSettings.from_dict(json.loads(text))).digest()[1]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.relative_to(ROOT).as_posix())
def test_prompts_are_those_of_the_committed_run(file: Path) -> None:
    run: dict[str, Any] = json.loads(file.read_text())
    plain = {key: value for key, value in run["settings"].items() if key not in HASHES}
    if run["command"] == "needle":  # neither methods nor samples change the first prompt of a cell
        assert plain.keys() == NeedleSettings().to_dict().keys()
        digest = needle_digest(json.dumps(plain | {"methods": ["dense"], "samples": 1, "query_agnostic": False}))
    elif run["command"] == "leaderboard":
        assert plain.keys() == LeaderboardSettings().to_dict().keys()
        digest = board_digest(json.dumps(plain))
    else:
        digest = vision_digest(json.dumps(plain))
        assert plain.keys() == VisionSettings().to_dict().keys()
    assert digest == run["settings"]["prompt_hash"]


def test_there_are_runs_of_all_kinds() -> None:
    found = {json.loads(file.read_text())["command"] for file in FILES}
    assert found == {NeedleTask.command, LeaderboardTask.command, VisionTask.command}
