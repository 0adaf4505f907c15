"""``llm-accel leaderboard``: RULER's own prompts and scores for every method at every share, in both ways."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
from PIL import Image

from llm_accel import ConfigError, list_methods
from llm_accel.cli import main
from llm_accel.common.statistics import wilson
from llm_accel.eval.grid import GridPoint
from llm_accel.eval.prompts.encoding import Encoder, make_frame
from llm_accel.eval.records import RunDir
from llm_accel.eval.runner import run_items
from llm_accel.eval.tasks.leaderboard.entries import FLOORS, BoardEntry, complete, registered
from llm_accel.eval.tasks.leaderboard.settings import LeaderboardSettings
from llm_accel.eval.tasks.leaderboard.table import compression
from llm_accel.eval.tasks.leaderboard.task import LeaderboardTask
from llm_accel.eval.tasks.ruler.settings import RulerSettings
from llm_accel.eval.tasks.ruler.task import RulerMaker
from llm_accel.methods import MethodConfig, MethodInfo, catalog, register_method
from llm_accel.methods.base import option
from llm_accel.registry import parse
from tests.eval.needle_helpers import ToldEngine, haystack, tiny_model, tokenizer

SMALL = {"lengths": (600, 1000), "tasks": ("niah_single_2", "niah_multikey_1"), "samples": 2, "wording": "ruler"}
HIP = "hip:sink=64,window=128,min_prefill_len=0"
GIVEN = ["--lengths", "1000,1200", "--samples", "1", "--tasks", "niah_multikey_2,vt", "--ratios", "0.5,0.125"]


def make_task(engine=None, **changed) -> LeaderboardTask:
    """A board on the tiny model; with ``engine``, which answers in both ways."""
    encoder = Encoder(tokenizer())
    settings = LeaderboardSettings(**SMALL | changed)
    maker = RulerMaker(encoder, make_frame(encoder, True), haystack("bundled", "grammar"), settings)
    task = LeaderboardTask(tiny_model(), tokenizer(), maker)
    if engine is not None:
        task.engine, task.engines = engine, dict.fromkeys(settings.ways, engine)
    return task


def run_task(task: LeaderboardTask, path) -> list[dict]:
    run_dir = RunDir(path, task.fields, task.plots)
    done = run_dir.open(task.settings.to_dict(), {})
    run_items(task, run_dir, done, log=lambda text: None, shown=False)
    return run_dir.records()


def test_all_methods_of_the_registry_are_there_and_the_rest_is_named():
    found, methods = registered(), complete(())
    suitable = [name for name, reason in found.items() if reason is None and name not in FLOORS]
    assert methods == (*suitable, *FLOORS)
    assert {"snapkv", "pyramidkv", "adakv", "h2o"} < set(methods)
    assert found["hip"] == "frees no memory" and found["retrieval_heads"] == "takes neither ratio nor budget"
    assert "fastv" not in found and "dense" not in found
    assert complete(["random:seed=3", "dense", "snapkv"]) == ("snapkv", "random:seed=3", "streaming_llm")
    for spec in methods:
        for ratio in (0.5, 0.03125):
            entry = BoardEntry(parse(spec), ratio)
            told = {"context": 1000} if spec == "auto" else {}
            assert replace(parse(entry.name), **told) == entry.at(1000) and entry.at(1000).ratio == ratio
    board = BoardEntry(parse("auto"), 0.25)
    assert (board.at(800).question, board.at(800, later=True).question) == ("in_prompt", "later")


def test_a_method_of_another_package_joins_with_the_budget_that_equals_the_share(monkeypatch):
    monkeypatch.setattr(catalog, "_registered", dict(catalog._registered))

    @register_method
    @dataclass(frozen=True)
    class Fixed(MethodConfig):
        """Takes a budget alone."""

        budget: int = option("entries", 2048)
        name: ClassVar[str] = "fixed"
        info: ClassVar[MethodInfo] = MethodInfo("none", "KV cache")

    assert "fixed" in complete(()) and list_methods()["fixed"] is Fixed
    entry = BoardEntry(Fixed(), 0.03125)
    assert entry.name == "fixed:budget=3.125%" and [entry.at(n).budget for n in (1000, 1024)] == [32, 32]
    assert entry.at(1025).budget == 33


@pytest.mark.parametrize(("specs", "message"), [
    (["snapkv:budget=64"], "the board sets the budget"),
    (["h2o:heavy=8"], "the board sets the budget"),
    (["retrieval_heads"], "takes neither ratio nor budget"),
    (["snapkv+hip"], "give one"),
])  # fmt: skip
def test_methods_with_a_budget_of_their_own_are_refused(specs, message):
    with pytest.raises(ConfigError, match=message):
        complete(specs)


def test_prompts_are_those_of_ruler_in_both_ways_and_scores_have_their_intervals(tmp_path):
    engine = ToldEngine(
        right=lambda m, p: m == "dense" or (m == "snapkv:ratio=0.25" and p.point.row == "niah_single_2")
    )
    task = make_task(engine, methods=("snapkv",), ratios=(0.5, 0.25))
    records = run_task(task, tmp_path)
    assert len(records) == task.wanted == 7 * 2 * 2 * 2 * 2  # methods, lengths, tasks, samples, ways
    ruler = RulerMaker(task.maker.encoder, task.maker.frame, task.maker.haystack, RulerSettings(**SMALL))
    for record in records:
        point = GridPoint(record["length"], record["task"], record["sample"])
        assert record["prompt_hash"] == ruler.make(point).digest()
    summary = task.summarize(records, command=task.command)
    assert summary["complete"] and list(summary["ways"]) == ["query-aware", "query-agnostic"]
    rows = summary["ways"]["query-agnostic"]
    assert [name for name, row in rows.items() if row["floor"]] == [
        f"{name}:ratio={ratio}" for name in ("streaming_llm", "random") for ratio in (0.5, 0.25)]  # fmt: skip
    row = rows["snapkv:ratio=0.25"]
    assert row["n"] == 8 and row["score"] == 0.5 and row["vs_dense"] == -0.5
    assert row["ci95"] == [round(end, 4) for end in wilson(4, 8)] and row["held"] == 0.25
    assert row["groups"]["niah_single"]["score"] == 1.0 and row["groups"]["niah_multikey"]["score"] == 0.0
    assert row["groups"]["niah_single"]["ci95"] == [round(end, 4) for end in wilson(4, 4)]
    assert rows["dense"]["score"] == 1.0 and rows["dense"]["held"] is None
    table = task.render(summary)
    assert "| `snapkv`                |                  | 0.00 (0.00-0.32), 25.0% | 0.50 (0.22-0.78), 25.0% |" in table
    assert "query-agnostic, 600" in table and "`random` (floor)" in table and "records missing" not in table


def test_a_budget_follows_the_length_of_the_prompt_and_what_cannot_be_is_left_out(tmp_path):
    engine = ToldEngine()
    task = make_task(engine, methods=(HIP,), ratios=(0.5, 0.25), lengths=(640, 1152), query_agnostic=False)
    assert task.left_out.keys() == {"retrieval_heads"}
    run_task(task, tmp_path)
    budgets = {(len(ids), parse(m).budget) for m, ids in engine.seen if m.startswith("hip")}
    assert budgets == {(512, 256), (512, 128), (1024, 512), (1024, 256)}
    odd = make_task(methods=(HIP,), ratios=(0.5, 0.03125), lengths=(640, 1000))
    assert "a multiple of 8" in odd.left_out[f"{HIP},budget=3.125%"]
    assert not any(name.startswith("hip") and "3.125" in name for name in odd.configs)
    assert any("a multiple of 8" in warning for warning in odd.warnings())


def test_a_crash_loses_nothing_and_the_board_goes_on(tmp_path):
    first = ToldEngine()
    whole = run_task(make_task(first, methods=("snapkv",), ratios=(0.5,), batch_size=2), tmp_path / "whole")
    with pytest.raises(RuntimeError, match="went away"):
        run_task(make_task(ToldEngine(fail_at=9), methods=("snapkv",), ratios=(0.5,), batch_size=2), tmp_path / "torn")
    again = ToldEngine()
    records = run_task(make_task(again, methods=("snapkv",), ratios=(0.5,), batch_size=2), tmp_path / "torn")
    assert {json.dumps(r, sort_keys=True) for r in records} == {json.dumps(r, sort_keys=True) for r in whole}
    assert 0 < again.calls < first.calls


def test_a_board_without_records_is_shown_as_such(tmp_path):
    task = make_task(ToldEngine(), methods=("snapkv",), ratios=(0.5,), lengths=(600,))
    summary = task.summarize([], command=task.command)
    assert not summary["complete"] and summary["missing"] == task.wanted == 4 * 8
    assert "| dense                   | -   |" in task.render(summary) and "32 records missing" in task.render(summary)
    task.draw(summary, [], tmp_path)
    assert (tmp_path / "curves.png").exists()


@pytest.mark.parametrize(("ratio", "label"), [(0.5, "2:1"), (0.03125, "32:1"), (0.4, "2.5:1"), (0.3, "3.33:1")])
def test_compression_in_words(ratio, label):
    assert compression(ratio) == label


def test_presets_are_defaults_and_what_is_given_wins():
    quick, full = LeaderboardSettings(model="any"), LeaderboardSettings(model="any", preset="full", samples=3)
    assert (quick.lengths, quick.samples, quick.tasks) == ((1024,), 5, ("niah_single_2", "niah_multikey_1"))
    assert (full.lengths, full.samples, len(full.tasks)) == ((1024, 2048, 4096, 8192), 3, 11)
    assert quick.ratios == (0.5, 0.25, 0.125, 0.0625, 0.03125) and quick.ways == (False, True)
    assert LeaderboardSettings.from_dict(json.loads(json.dumps(full.to_dict()))) == full


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


def test_a_run_leaves_all_files_with_the_bytes_that_are_held(model_path, tmp_path, capsys):
    arguments = ["leaderboard", "--model", model_path, "--out", str(tmp_path), *GIVEN]
    assert main([*arguments, "--method", "adakv", "--method", "snapkv"]) == 0
    tables, last = capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)
    summary = json.loads(last)
    assert summary["complete"] and summary["records"] == 9 * 4 * 2
    assert "left out: hip: frees no memory" in tables and "| query-agnostic, 1200" in tables
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["cells.jsonl", "curves.png", "run.json", "summary.json"]
    with Image.open(tmp_path / "curves.png") as image:
        image.verify()
    aware, agnostic = summary["ways"]["query-aware"], summary["ways"]["query-agnostic"]
    assert aware["snapkv:ratio=0.5"]["held"] == pytest.approx(0.5, abs=0.002)
    assert aware["snapkv:ratio=0.125"]["held"] == pytest.approx(0.125, abs=0.002)
    assert aware["streaming_llm:ratio=0.125"]["held"] == pytest.approx(0.125, abs=0.002)
    assert aware["adakv:ratio=0.125"]["held"] >= 0.125
    # the question follows whole, so that more is held
    assert 0.5 < agnostic["snapkv:ratio=0.5"]["held"] < 0.6
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["settings"]["samples"] == 1 and run["settings"]["seed"] == 42 and {"versions", "hardware"} <= run.keys()

    assert main([*arguments, "--method", "adakv", "--method", "snapkv", "--json-only"]) == 0
    again = capsys.readouterr()
    assert again.out == last + "\n" and "72 records found, 0 to do" in again.err
    assert main(arguments) == 2
    assert "methods: " in capsys.readouterr().err


@pytest.mark.parametrize(("more", "message"), [
    (["--ratios", "0.5,1"], "shares above 0 and below 1"),
    (["--ratios", "half"], "shares above 0 and below 1"),
    (["--preset", "huge"], "--preset"),
    (["--method", "snapkv:ratio=0.5"], "the board sets the budget"),
])  # fmt: skip
def test_wrong_arguments_end_before_anything_is_written(model_path, tmp_path, capsys, more, message):
    assert main(["leaderboard", "--model", model_path, "--out", str(tmp_path / "run"), *GIVEN, *more]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()
