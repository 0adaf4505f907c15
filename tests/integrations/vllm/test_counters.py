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
    made.add(4, 4096)
    counted.set()
    end.wait(60)


@pytest.mark.parametrize(("kind", "read"), [("spawn", True), ("fork", True), ("fork", False)])
def test_counts_cross_processes_and_leave_nothing_behind(kind, read, tmp_path):
    context = multiprocessing.get_context(kind)
    counted, end = context.Event(), context.Event()
    reader = Reader(0)
    assert reader.read() is None  # not yet
    child = context.Process(target=_schedules, args=(0, str(tmp_path), counted, end))
    child.start()
    assert counted.wait(120) and path_of(0).stat().st_mode & 0o777 == 0o600
    if read:
        assert reader.read() == Counts(7, 4096)
        assert not path_of(0).exists()  # from here on a kill leaves nothing
    end.set()
    child.join(60)
    assert child.exitcode == 0 and not path_of(0).exists()
    assert reader.read() == (Counts(7, 4096) if read else None)


def test_engines_of_one_server_and_servers_of_one_machine_have_counts_of_their_own(monkeypatch):
    Counters(0).add(1, 8)
    Counters(1).add(2, 8)
    assert Reader(1).read() == Counts(2, 8) and Reader(0).read() == Counts(1, 8)
    Counters(0).add(3, 8)  # the next engine in this process
    assert Reader(0).read() == Counts(3, 8)
    name_run()
    assert os.environ["LLM_ACCEL_VLLM_RUN"] == "abc"
    monkeypatch.delenv("LLM_ACCEL_VLLM_RUN")
    name_run()
    assert len(os.environ["LLM_ACCEL_VLLM_RUN"]) == 16 and Reader(0).read() is None


def test_several_servers_read_the_same_counts(tmp_path, monkeypatch):
    """vLLM gives them a folder, which it removes."""
    folder = tmp_path / "shared"
    folder.mkdir()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(folder))
    Counters(0).add(5, 8)
    assert path_of(0).parent == folder
    assert Reader(0).read() == Reader(0).read() == Counts(5, 8)


def test_a_file_that_cannot_be_made_costs_the_figures_alone(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    path_of(0).write_text("somebody's")
    with caplog.at_level(logging.WARNING):
        Counters(0).add(3, 8)
    assert "will not be seen in /metrics" in caplog.text and path_of(0).read_text() == "somebody's"
    path_of(1).symlink_to(path_of(0))
    assert Reader(1).read() is None
    path_of(0).unlink()
    Counters(0).add(3, 8)
    monkeypatch.setattr(os, "getuid", lambda: 12345)  # a file of another user's
    assert Reader(0).read() is None
