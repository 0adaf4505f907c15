"""``llm-accel ruler`` from end to end on a tiny random model."""

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


def _ruler(model_path, out, *more):
    common = ["--lengths", "1000,1200", "--samples", "1", "--tasks", "niah_multikey_2,vt"]
    return main(["ruler", "--model", model_path, "--out", str(out), *common, *more])


def test_a_run_leaves_all_files_and_goes_on_where_it_stopped(model_path, tmp_path, capsys):
    methods = ["--method", "dense", "--method", "snapkv:budget=64"]
    assert _ruler(model_path, tmp_path, *methods, "--samples", "2", "--batch-size", "2") == 0
    printed = capsys.readouterr()
    tables, last = printed.out.rstrip("\n").rsplit("\n", 1)
    summary = json.loads(last)
    assert summary["complete"] and summary["records"] == 16 and summary["wording"] == "ruler"
    assert list(summary["methods"]) == ["dense", "snapkv:budget=64"]
    assert "void, dense answers less than half of them: 1000: niah_multikey_2, vt" in tables
    assert "multikey_2" in tables and "samples per task and length: 2" in tables
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["cells.jsonl", "run.json", "summary.json", "tasks.png"]
    with Image.open(tmp_path / "tasks.png") as image:
        image.verify()
    dense, snap = (summary["methods"][m]["lengths"]["1200"] for m in summary["methods"])
    assert snap["dense_kv_bytes"] == dense["kv_bytes"] > snap["kv_bytes"]
    assert set(dense["tasks"]) == {"niah_multikey_2", "vt"}
    records = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()]
    assert all(r["new_tokens"] <= {"vt": 30}.get(r["task"], 128) for r in records)

    assert _ruler(model_path, tmp_path, *methods, "--samples", "2", "--batch-size", "2", "--json-only") == 0
    again = capsys.readouterr()
    assert again.out == last + "\n" and "16 records found, 0 to do" in again.err
    assert _ruler(model_path, tmp_path, *methods, "--batch-size", "2") == 2
    assert "samples: 2 there, 1 now" in capsys.readouterr().err


def test_query_agnostic_runs_of_a_shard(model_path, tmp_path, capsys):
    assert _ruler(model_path, tmp_path, "--method", "streaming_llm:budget=64", "--query-agnostic", "--shard", "2/2",
                  "--no-plot", "--batch-size", "2", "--samples", "2") == 0  # fmt: skip
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["records"] == 4 == summary["missing"] and summary["query_agnostic"]


def test_samples_for_other_harnesses(model_path, tmp_path, capsys):
    file = tmp_path / "samples.jsonl"
    assert _ruler(model_path, tmp_path / "run", "--write-samples", str(file)) == 0
    assert json.loads(capsys.readouterr().out)["same_tokens"] == 4 and not (tmp_path / "run").exists()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["task"], row["length"], row["max_new_tokens"]) for row in rows] == [
        ("niah_multikey_2", 1000, 128), ("vt", 1000, 30), ("niah_multikey_2", 1200, 128), ("vt", 1200, 30)]  # fmt: skip
    for row in rows:
        assert row["prompt"] == f"<|bos|><|user|>{row['input']}<|assistant|>{row['answer_prefix']}"
        assert len(tokenizer().encode(row["prompt"], add_special_tokens=False)) == row["length"] - row["max_new_tokens"]
        assert row["input"].endswith(("provided text?", "in the text above."))


@pytest.mark.parametrize(("more", "message"), [
    (["--lengths", "200"], "niah_multikey_2 needs more; give at least|vt needs more; give at least"),
    (["--tasks", "niah_multkey_2"], "Did you mean 'niah_multikey_2'?"),
    (["--tasks", "qa_1"], "--qa-1"),
    (["--qa-1", "nowhere.jsonl", "--tasks", "qa_1"], "no such file"),
    (["--words", "nowhere.txt", "--tasks", "cwe"], "--words 'nowhere.txt'"),
    (["--wording", "mine"], "--wording"),
    (["--samples", "0"], "--samples"),
    (["--shard", "1/2", "--overwrite"], "records of the other shards"),
])  # fmt: skip
def test_wrong_arguments_end_before_anything_is_written(model_path, tmp_path, capsys, more, message):
    assert _ruler(model_path, tmp_path / "run", *more) == 2
    error = capsys.readouterr().err
    assert any(part in error for part in message.split("|")), error
    assert not (tmp_path / "run").exists()
