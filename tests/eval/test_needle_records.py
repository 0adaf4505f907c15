"""The run directory: continued with equal settings, refused with others, nothing lost in a crash."""

from __future__ import annotations

import json
import threading

import pytest

from llm_accel import ConfigError
from llm_accel.eval.records import RunDir
from llm_accel.eval.runner import run_items
from llm_accel.eval.tasks.needle.settings import NeedleSettings
from llm_accel.eval.tasks.needle.task import NeedleTask
from tests.eval.needle_helpers import ToldEngine, make_maker, tiny_model, tokenizer

SETTINGS = NeedleSettings(
    lengths=(256, 512), depths=(0.0, 50.0, 100.0), samples=2, methods=("dense", "random:budget=64")
)


def _directory(path) -> RunDir:
    return RunDir(path, NeedleTask.fields, NeedleTask.plots)


def _run(path, engine, shard=(1, 1), **changed):
    maker = make_maker(**{**SETTINGS.__dict__, **changed})
    task = NeedleTask(tiny_model(), tokenizer(), maker)
    task.engine = engine
    run_dir = _directory(path)
    done = run_dir.open(maker.settings.to_dict(), {})
    said: list[str] = []
    run_items(task, run_dir, done, shard, said.append, shown=False)
    return run_dir.records(), said


def _key(record):
    return tuple(record[field] for field in NeedleTask.fields)


def test_every_method_gets_the_same_prompts_and_every_record_is_whole(tmp_path):
    engine = ToldEngine(right=lambda method, prompt: method == "dense" or prompt.point.row == 100)
    records, said = _run(tmp_path, engine, batch_size=4, query_agnostic=True)
    assert len(records) == len({_key(r) for r in records}) == 24
    by_method = {m: {r["prompt_hash"] for r in records if r["method"] == m} for m in SETTINGS.methods}
    assert by_method["dense"] == by_method["random:budget=64"] and len(by_method["dense"]) == 12
    for record in records:
        assert record["query_agnostic"] is True and record["chat_template"] is True
        assert record["exact"] == float(record["method"] == "dense" or record["depth"] == 100)
        assert record["expected"][0] in record["answer"] or not record["exact"]
    assert any("12 cells" in line or "6 cells" in line for line in said)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_crash_loses_nothing_and_the_run_goes_on(tmp_path, batch_size):
    whole, _ = _run(tmp_path / "whole", ToldEngine(), batch_size=batch_size)
    with pytest.raises(RuntimeError, match="went away"):
        _run(tmp_path / "torn", ToldEngine(fail_at=7), batch_size=batch_size)
    cells = tmp_path / "torn" / "cells.jsonl"
    kept = cells.read_bytes()
    assert kept.count(b"\n") >= 3
    cells.write_bytes(kept[:-25])  # the last line was being written
    engine = ToldEngine()
    records, said = _run(tmp_path / "torn", engine, batch_size=batch_size)
    key = lambda r: (_key(r), r["exact"], r["prompt_hash"])  # noqa: E731
    assert sorted(map(key, records)) == sorted(map(key, whole))
    assert engine.calls < ToldEngine().calls + 24 and "records found" in said[0]
    lines = cells.read_text().splitlines()
    assert len(lines) == 25 and kept[:-25].decode().splitlines()[-1] in lines  # the torn line still stands apart


def test_a_finished_run_runs_nothing(tmp_path):
    _run(tmp_path, ToldEngine())
    engine = ToldEngine()
    records, said = _run(tmp_path, engine)
    assert engine.calls == 0 and len(records) == 24 and said == [f"{tmp_path}: 24 records found, 0 to do"]


def test_other_settings_are_refused_by_name(tmp_path):
    _run(tmp_path, ToldEngine())
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match=r"seed: 0 there, 3 now; query_agnostic|query_agnostic.*seed: 0 there, 3 now"):
        _run(tmp_path, ToldEngine(), seed=3, query_agnostic=True)
    with pytest.raises(ConfigError, match="--overwrite") as error:
        _run(tmp_path, ToldEngine(), samples=1)
    assert "samples: 2 there, 1 now" in str(error.value) and "lengths" not in str(error.value)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_overwrite_removes_only_what_a_run_writes(tmp_path):
    _run(tmp_path, ToldEngine())
    (tmp_path / "notes.txt").write_text("mine")
    assert _directory(tmp_path).open({"seed": 9}, {}, overwrite=True) == []
    assert sorted(file.name for file in tmp_path.iterdir()) == ["notes.txt", "run.json"]


def test_shards_share_a_directory_and_make_a_whole(tmp_path):
    for i in (3, 1, 2):
        records, _ = _run(tmp_path, ToldEngine(), shard=(i, 3))
    whole, _ = _run(tmp_path / "whole", ToldEngine())
    assert {_key(r) for r in records} == {_key(r) for r in whole}
    assert {r["shard"] for r in records} == {"1/3", "2/3", "3/3"}


def test_lines_of_several_writers_do_not_mix(tmp_path):
    run_dir = _directory(tmp_path)
    run_dir.open({}, {})

    def write(i: int) -> None:
        for j in range(20):
            run_dir.append(
                [{"method": f"m{i}", "length": j, "depth": 0, "sample": s, "text": "x" * 500} for s in range(4)]
            )

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(run_dir.records()) == 4 * 20 * 4


@pytest.mark.parametrize("content", ["", "{", "[]", '{"settings": 3}', "{}"])
def test_a_foreign_run_file_is_refused(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ConfigError, match="cannot be read as that of a run"):
        _directory(tmp_path).open({"seed": 0}, {})


def test_places_that_are_no_run_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        _directory(tmp_path / "file").open({}, {})
    with pytest.raises(ConfigError, match="cannot be used"):
        _directory(tmp_path / "file" / "below").open({}, {})
    (tmp_path / "cells.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"without run\.json"):
        _directory(tmp_path).open({}, {})


def test_run_file_tells_settings_and_more(tmp_path):
    _directory(tmp_path).open(SETTINGS.to_dict(), {"versions": {"torch": "2"}})
    written = json.loads((tmp_path / "run.json").read_text())
    assert written["settings"] == SETTINGS.to_dict() and written["versions"] == {"torch": "2"}
