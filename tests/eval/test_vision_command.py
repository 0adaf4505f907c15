"""``llm-accel vision`` from end to end on a tiny random model."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from llm_accel.cli import main
from llm_accel.eval.tasks.vision import engine
from tests.eval.vision_helpers import records, save_tiny, vision


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


def test_a_run_leaves_all_files_and_the_summary_on_the_last_line(model, tmp_path, capsys):
    methods = ["dense", "blank", "flowcut", "oracle:ratio=0.33", "fastv", "flowcut+dyvte:exit=1"]
    argv = [part for method in methods for part in ("--method", method)]
    assert vision(model, tmp_path, *argv, "--keep", "0.1,1") == 0
    tables, last = capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)
    summary = json.loads(last)
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert summary["complete"] and summary["samples"] == 2 and summary["records"] == len(records(tmp_path))
    rows = summary["methods"]
    assert list(rows) == [
        "dense", "blank", "flowcut:ratio=0.1", "flowcut:ratio=1.0", "oracle:ratio=0.33",
        "fastv:ratio=0.1", "fastv:ratio=1.0", "flowcut:ratio=0.1+dyvte:exit=1.0",
        "flowcut:ratio=1.0+dyvte:exit=1.0", "blind",
    ]  # fmt: skip
    assert all(name in tables for name in rows) and "CHAIR_i" in tables and "adversarial" in tables
    seen = {name: (row["visual_before"], row["visual_after"], row["visual_per_layer"]) for name, row in rows.items()}
    assert seen["dense"] == seen["blank"] == seen["flowcut:ratio=1.0"] == (100, 100, 100)
    assert seen["flowcut:ratio=0.1"] == (100, 10, 10) and seen["blind"] == (0, 0, 0)
    assert seen["fastv:ratio=0.1"] == (100, 10, 55)  # two of four layers see everything
    assert seen["flowcut:ratio=0.1+dyvte:exit=1.0"] == (100, 0, 5)
    assert rows["oracle:ratio=0.33"]["patch_recall"] == rows["dense"]["patch_recall"] == 1
    assert rows["flowcut:ratio=0.1+dyvte:exit=1.0"]["patch_recall"] == 0 and rows["blind"]["patch_recall"] is None
    assert rows["flowcut:ratio=0.1"]["flops_vs_dense"] < rows["fastv:ratio=0.1"]["flops_vs_dense"] < 1
    dense, whole = (
        [record["answer"] for record in records(tmp_path) if record["method"] == name]
        for name in ("dense", "fastv:ratio=1.0")
    )
    assert dense == whole  # nothing to cut, nothing changed
    pictures = {file.name for file in tmp_path.glob("*.png")}
    assert {"curves.png", "kept-oracle-ratio-0.33.png", "kept-flowcut-ratio-0.1.png"} <= pictures
    assert not {"kept-dense.png", "kept-blind.png"} & pictures
    for name in pictures:
        with Image.open(tmp_path / name) as image:
            image.verify()
    about = json.loads((tmp_path / "run.json").read_text())
    assert {"prompt_hash", "weights_hash", "seed", "split", "tasks"} <= set(about["settings"])


def test_the_same_command_goes_on_and_another_is_refused(model, tmp_path, capsys, monkeypatch):
    argv = ["--method", "dense", "--method", "random_tokens", "--no-blind", "--tasks", "colour,count", "--json-only",
            "--no-plot"]  # fmt: skip
    real, calls = engine.VisionEngine.run, []

    def stop_later(self, *args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(engine.VisionEngine, "run", stop_later)
    assert vision(model, tmp_path, *argv) == 130
    half = records(tmp_path)
    assert len(half) == 4 and json.loads((tmp_path / "summary.json").read_text())["missing"] == 4
    capsys.readouterr()
    assert vision(model, tmp_path, *argv) == 0
    assert len(calls) == 5 and records(tmp_path)[:4] == half and len(records(tmp_path)) == 8
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1 and "4 records found" in printed.err
    assert vision(model, tmp_path, *argv, "--seed", "1") == 2
    assert "seed: 0 there, 1 now" in capsys.readouterr().err
    assert vision(model, tmp_path, *argv, "--seed", "1", "--overwrite") == 0
    assert len(records(tmp_path)) == 8 and not list(tmp_path.glob("*.png"))


def test_shards_make_a_whole_and_samples_do_not_depend_on_their_number(model, tmp_path):
    argv = ["--method", "dense", "--tasks", "caption", "--split", "dense", "--no-plot", "--json-only", "--no-blind"]
    for shard in ("2/2", "1/2"):
        assert vision(model, tmp_path / "parts", *argv, "--shard", shard) == 0
    assert vision(model, tmp_path / "one", *argv, "--samples", "1") == 0
    parts = sorted(records(tmp_path / "parts"), key=lambda record: record["sample"])
    (one,) = records(tmp_path / "one")
    assert [record["sample"] for record in parts] == [0, 1] and 8 <= parts[0]["there"] <= 12
    same = ("expected", "answer", "question")
    assert [one[key] for key in same] == [parts[0][key] for key in same]


def _write_rows(folder, name, rows):
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for row in rows:
        if row.get("image"):
            Image.fromarray(rng.integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(folder / row["image"])
    (folder / name).write_text("\n".join(map(json.dumps, rows)))
    return folder / name


def test_pope_from_a_file(model, tmp_path, capsys):
    rows = [
        {"image": "a.png", "text": "is there a cat ?", "label": "no"},
        {"image": "a.png", "text": "is there a dog ?", "label": "yes"},
        {"image": "b.png", "question": "is there a dog ?", "answer": "Yes", "category": "popular"},
    ]
    file = _write_rows(tmp_path / "data", "coco_pope_adversarial.jsonl", rows)
    argv = ["--method", "dense", "--method", "flowcut:budget=20", "--json-only", "--data", f"pope:{file}"]
    assert vision(model, tmp_path / "run", *argv, "--prompt", "a thing <image> {question}") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["samples"] == 2 and summary["records"] == 9 and summary["complete"]
    pope = summary["methods"]["flowcut:budget=20"]["pope"]
    assert {split: part["n"] for split, part in pope.items()} == {"popular": 1, "adversarial": 2}
    assert summary["methods"]["flowcut:budget=20"]["patch_recall"] is None
    assert json.loads((tmp_path / "run" / "run.json").read_text())["prompt"] == "a thing <image> {question}"
    assert "single word" in records(tmp_path / "run")[0]["question"]


def test_chair_from_a_dataset_on_disk(model, tmp_path, capsys):
    rows = [
        {"file_name": "a.png", "image": "a.png", "objects": ["dog", "person"], "captions": ["A puppy on a couch"]},
        {"file_name": "b.png", "image": "b.png", "objects": [], "captions": ["nothing"]},
    ]
    file = _write_rows(tmp_path / "plain", "rows.jsonl", rows)
    argv = ["--method", "dense", "--json-only", "--no-blind", "--no-plot"]
    assert vision(model, tmp_path / "file", *argv, "--data", f"chair:{file}") == 0
    folder = tmp_path / "images" / "test"  # the layout of datasets' imagefolder
    folder.parent.mkdir()
    for row in rows:
        del row["image"]
    _write_rows(folder, "metadata.jsonl", rows)
    for row in rows:
        (tmp_path / "plain" / row["file_name"]).rename(folder / row["file_name"])
    assert vision(model, tmp_path / "set", *argv, "--data", f"chair:{folder.parent}") == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    for summary in (first, second):
        assert summary["methods"]["dense"]["chair"]["n"] == 2
    there = [record["there"] for record in records(tmp_path / "set")]
    assert there == [record["there"] for record in records(tmp_path / "file")] == [3, 0]  # with the couch of a caption


def test_the_bundled_model_sees_and_the_blind_one_guesses(tmp_path, capsys):
    argv = ["vision", "--samples", "6", "--tasks", "colour,shape", "--method", "dense", "--method", "oracle:budget=40"]
    assert main([*argv, "--out", str(tmp_path), "--json-only", "--no-plot"]) == 0
    rows = json.loads(capsys.readouterr().out)["methods"]
    assert rows["dense"]["exact"] > 0.9 and rows["oracle:budget=40"]["exact"] > 0.9 > 0.5 > rows["blind"]["exact"]


@pytest.mark.parametrize(("more", "message"), [
    (["--no-gaps"], "bundled model"),
    (["--samples", "0"], "--samples 0"),
    (["--split", "crowded"], "--split"),
    (["--tasks", "colour,shapes"], "Did you mean 'shape'"),
    (["--tasks", ","], "--tasks is empty"),
    (["--keep", "0.1,2"], "at most 1"),
    (["--method", "dense", "--keep", "0.1"], "takes a ratio of visual tokens"),
    (["--method", "flowcut:budget=8+snapvk:budget=8"], "Did you mean 'snapkv'"),
    (["--method", "oracle+flowcut"], "both decide which visual tokens"),
    (["--method", "blind+flowcut"], "cannot be joined"),
    (["--method", "dyvte:exit=9"], "layers 0 to 3"),
    (["--data", "vqa:x"], "pope:SOURCE"),
    (["--data", "pope:nowhere.jsonl"], "no such file"),
    (["--data", "pope:x.jsonl", "--split", "dense"], "--split belongs to generated scenes"),
    (["--prompt", "{question}"], "<image>"),
    (["--shard", "3/2"], "--shard"),
])  # fmt: skip
def test_wrong_arguments_end_before_anything_is_written(model, tmp_path, capsys, more, message):
    assert vision(model, tmp_path / "run", *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("row", "message"), [
    ({"image": "a.png", "text": "?", "label": "maybe"}, "yes or no"),
    ({"text": "?", "label": "no"}, "POPE needs image"),
])  # fmt: skip
def test_rows_that_are_no_pope(model, tmp_path, capsys, row, message):
    file = _write_rows(tmp_path / "data", "rows.jsonl", [row])
    assert vision(model, tmp_path / "run", "--data", f"pope:{file}") == 2
    assert message in capsys.readouterr().err


def test_objects_that_are_no_coco_categories(model, tmp_path, capsys):
    file = _write_rows(tmp_path / "data", "rows.jsonl", [{"image": "a.png", "objects": ["dog", "puppy"]}])
    assert vision(model, tmp_path / "run", "--data", f"chair:{file}") == 2
    assert "'puppy' is not a COCO category" in capsys.readouterr().err
