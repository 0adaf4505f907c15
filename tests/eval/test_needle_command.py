"""``llm-accel needle`` from end to end on a tiny random model."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from llm_accel.cli import main
from tests.eval.needle_helpers import tiny_model, tokenizer


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


def _needle(model_path, out, *more):
    return main(["needle", "--model", model_path, "--lengths", "192,256", "--depths", "2", "--out", str(out), *more])


def test_a_run_leaves_all_files_and_the_summary_on_the_last_line(model_path, tmp_path, capsys):
    assert _needle(model_path, tmp_path / "run") == 0
    printed = capsys.readouterr()
    table, last = printed.out.rstrip("\n").rsplit("\n", 1)
    summary = json.loads(last)
    assert summary["complete"] and summary["records"] == 16 and summary["query_agnostic"] is False
    assert list(summary["methods"]) == ["dense", "snapkv:budget=128", "streaming_llm:budget=128", "random:budget=128"]
    assert all(name in table for name in summary["methods"]) and "95 % interval" in table
    assert "4 cells, 16 prompts" in printed.err
    names = sorted(file.name for file in (tmp_path / "run").iterdir())
    assert names == ["cells.jsonl", "heatmap.png", "run.json", "summary.json"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    with Image.open(tmp_path / "run" / "heatmap.png") as image:
        image.verify()
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["settings"]["chat_template"] is True and about["settings"]["max_new_tokens"] > 3
    assert about["settings"]["dtype"] == "float32" and about["settings"]["device"] == "cpu"
    assert {"prompt_hash", "weights_hash", "seed"} <= set(about["settings"])
    assert about["versions"]["torch"] and about["hardware"]["torch_threads"]
    dense, snap = (summary["methods"][m]["lengths"]["256"] for m in ("dense", "snapkv:budget=128"))
    assert snap["dense_kv_bytes"] == dense["kv_bytes"] > snap["kv_bytes"]


def test_the_same_command_goes_on_and_another_is_refused(model_path, tmp_path, capsys, monkeypatch):
    _needle(model_path, tmp_path, "--method", "dense", "--json-only", "--no-plot")
    first = capsys.readouterr().out
    assert first.count("\n") == 1
    assert _needle(model_path, tmp_path, "--method", "dense", "--json-only") == 0
    again = capsys.readouterr()
    assert again.out == first and "4 records found, 0 to do" in again.err and "other versions" not in again.err
    monkeypatch.setattr("llm_accel.eval.runner.versions", lambda: {"torch": "1.0"})
    _needle(model_path, tmp_path, "--method", "dense", "--no-plot")
    assert "made with other versions" in capsys.readouterr().err
    assert _needle(model_path, tmp_path, "--method", "dense", "--seed", "1") == 2
    assert "seed: 0 there, 1 now" in capsys.readouterr().err
    assert _needle(model_path, tmp_path, "--method", "dense", "--no-chat-template") == 2
    assert "chat_template: true there, false now" in capsys.readouterr().err
    assert _needle(model_path, tmp_path, "--method", "dense", "--seed", "1", "--overwrite", "--no-plot") == 0
    assert not (tmp_path / "heatmap.png").exists()


@pytest.mark.parametrize("more", [
    ["--query-agnostic", "--batch-size", "3", "--samples", "2", "--key-kind", "uuid", "--lengths", "640"],
    ["--no-chat-template", "--no-answer-prefix", "--max-new-tokens", "4", "--attn", "eager"],
    ["--task", "multivalue", "--value-kind", "uuid", "--needles", "2", "--dtype", "bfloat16",
     "--max-new-tokens", "3"],
    ["--task", "multiquery", "--needles", "2", "--distractors", "1", "--value-kind", "word"],
    ["--task", "single", "--shard", "2/2"],
])  # fmt: skip
def test_all_kinds_of_runs_go_through(model_path, tmp_path, capsys, more):
    argv = ["--method", "dense", "--method", "snapkv:budget=64", "--no-plot", *more]
    assert _needle(model_path, tmp_path, *argv) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["complete"] is ("--shard" not in more)
    records = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()]
    assert {record["query_agnostic"] for record in records} == {"--query-agnostic" in more}


@pytest.mark.parametrize(("more", "message"), [
    (["--lengths", "40"], "give at least"),
    (["--haystack", "nowhere.txt"], "no such file or folder"),
    (["--device", "warp"], "--device 'warp'"),
    (["--attn", "nothing"], "--attn|cannot be loaded"),
    (["--method", "snapkv:budget=8"], "budget"),
    (["--shard", "3/2"], "--shard"),
    (["--shard", "1/2", "--overwrite"], "records of the other shards"),
    (["--samples", "0"], "--samples"),
])  # fmt: skip
def test_wrong_arguments_end_before_anything_is_written(model_path, tmp_path, capsys, more, message):
    assert _needle(model_path, tmp_path / "run", *more) == 2
    error = capsys.readouterr().err
    assert any(part in error for part in message.split("|")), error
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_not_there(tmp_path, capsys):
    assert _needle(str(tmp_path / "no-model"), tmp_path / "run") == 2
    assert "no such folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert _needle(str(tmp_path / "empty"), tmp_path / "run") == 2
    assert "cannot be loaded" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_interrupted_run_still_leaves_a_summary(model_path, tmp_path, monkeypatch):
    from llm_accel.eval import engine

    calls = []
    real = engine.TextEngine.run

    def stop_later(self, prompts, config):
        calls.append(prompts)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(self, prompts, config)

    monkeypatch.setattr(engine.TextEngine, "run", stop_later)
    assert _needle(model_path, tmp_path) == 130
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["complete"] is False and 0 < summary["records"] < 16
    assert (tmp_path / "heatmap.png").exists()


def test_the_default_directory_is_named_after_the_settings(model_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = ["needle", "--model", model_path, "--lengths", "192", "--depths", "1", "--method", "dense", "--no-plot"]
    assert main(common) == main(common) == main([*common, "--seed", "1"]) == 0
    assert len(list((tmp_path / "runs").iterdir())) == 2
