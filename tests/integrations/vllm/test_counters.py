"""What is freed, from the process that schedules to the one that shows it. Needs no vLLM."""

from __future__ import annotations

import logging
import multiprocessing
import os
import tempfile

import pytest

from llm_accel.integrations.vllm.counters import Counters, Counts, Reader, name_run, path_of


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.setenv("LLM_ACCEL_VLLM_RUN", "abc")


def _schedules(engine: int, folder: str, counted, end) -> None:
    tempfile.tempdir = folder
    made = Counters(engine)
    made.add(3, 4096)
    counted.set()
    end.wait(60)
    made.add(4, 4096)


@pytest.mark.parametrize("kind", ["spawn", "fork"])
def test_counts_cross_processes_and_leave_nothing_behind(kind, tmp_path):
    context = multiprocessing.get_context(kind)
    counted, end = context.Event(), context.Event()
    reader = Reader(0)
    assert reader.read() is None and path_of(0).stat().st_mode & 0o777 == 0o600
    child = context.Process(target=_schedules, args=(0, str(tmp_path), counted, end))
    child.start()
    assert counted.wait(120) and reader.read() == Counts(3, 4096)
    assert not path_of(0).exists()  # from here on a kill leaves nothing
    end.set()
    child.join(60)
    assert child.exitcode == 0 and reader.read() == Counts(7, 4096)
    assert not list(tmp_path.iterdir())


def test_engines_that_nobody_asks_make_no_file(tmp_path):
    Counters(0).add(3, 8)
    assert not list(tmp_path.iterdir())


def test_engines_of_one_server_and_servers_of_one_machine_have_counts_of_their_own(monkeypatch):
    readers = Reader(0), Reader(1)
    Counters(0).add(1, 8)
    Counters(1).add(2, 8)
    assert [one.read() for one in readers] == [Counts(1, 8), Counts(2, 8)]
    idle, later = Reader(0), Reader(0)  # the next engines in this process, of which the first frees nothing
    Counters(0).add(3, 8)
    assert later.read() == Counts(3, 8) and idle.read() is None
    name_run()
    assert os.environ["LLM_ACCEL_VLLM_RUN"] == "abc"
    monkeypatch.delenv("LLM_ACCEL_VLLM_RUN")
    name_run()
    assert len(os.environ["LLM_ACCEL_VLLM_RUN"]) == 16


def test_several_servers_read_the_same_counts(tmp_path, monkeypatch):
    """vLLM gives them a folder, which it removes."""
    folder = tmp_path / "shared"
    folder.mkdir()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(folder))
    first, counters = Reader(0), Counters(0)
    counters.add(5, 8)
    assert path_of(0).parent == folder
    assert first.read() == Reader(0).read() == Counts(5, 8)
    counters.add(1, 8)
    assert first.read() == Counts(6, 8)


def test_a_file_that_cannot_be_made_costs_the_figures_alone(caplog, tmp_path, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with caplog.at_level(logging.WARNING):
        reader = Reader(0)
    Counters(0).add(3, 8)
    assert "/metrics will not show freed blocks" in caplog.text and reader.read() is None


def test_files_of_others_are_left_alone(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("somebody's")
    path_of(0).symlink_to(victim)
    Counters(0).add(3, 8)
    assert victim.read_text() == "somebody's"
    path_of(1).write_bytes(b"")
    monkeypatch.setattr(os, "getuid", lambda: 12345)  # the file of another user
    Counters(1).add(3, 8)
    assert path_of(1).read_bytes() == b""
