"""What is freed, from the process that schedules to the one that shows it. Needs no vLLM."""

from __future__ import annotations

import logging
import multiprocessing
import os
import tempfile

import pytest

from llm_accel.integrations.vllm.counters import Counters, Reader, files, name_run
from llm_accel.integrations.vllm.counts import Counts, Labels

FIRST, SECOND = Labels("m", "0", "snapkv:budget=8"), Labels("m", "1", "snapkv:budget=8")


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.setenv("LLM_ACCEL_VLLM_RUN", "abc")


def _schedules(folder: str, counted, end) -> None:
    tempfile.tempdir = folder
    made = Counters(FIRST)
    made.run(2)
    made.add(3, 4096)
    counted.set()
    end.wait(60)
    made.add(4, 4096)
    made.run(0)


@pytest.mark.parametrize("kind", ["spawn", "fork"])
@pytest.mark.parametrize("read", [True, False])
def test_counts_cross_processes_and_leave_nothing_behind(kind, read, tmp_path):
    context = multiprocessing.get_context(kind)
    counted, end = context.Event(), context.Event()
    child = context.Process(target=_schedules, args=(str(tmp_path), counted, end))
    child.start()
    assert counted.wait(120)
    (path,) = files()
    assert path.stat().st_mode & 0o777 == 0o600
    reader = Reader(path) if read else None
    assert path.exists() is not read  # once it is read, a kill leaves nothing
    assert reader is None or (reader.labels, reader.read()) == (FIRST, Counts(3, 3 * 4096, 2))
    end.set()
    child.join(60)
    assert child.exitcode == 0 and (reader is None or reader.read() == Counts(7, 7 * 4096, 0))
    assert not list(tmp_path.iterdir())


def test_engines_of_one_server_and_servers_of_one_machine_have_counts_of_their_own(monkeypatch):
    made = Counters(FIRST), Counters(SECOND)
    made[0].add(1, 8)
    made[1].add(2, 8)
    found = {one.labels: one.read() for one in map(Reader, files())}
    assert found == {FIRST: Counts(1, 8), SECOND: Counts(2, 16)}
    monkeypatch.setenv("LLM_ACCEL_VLLM_RUN", "another")
    Counters(FIRST)
    (other,) = files()
    monkeypatch.setenv("LLM_ACCEL_VLLM_RUN", "abc")
    assert not files() and other.exists()
    name_run()
    assert os.environ["LLM_ACCEL_VLLM_RUN"] == "abc"
    monkeypatch.delenv("LLM_ACCEL_VLLM_RUN")
    name_run()
    assert len(os.environ["LLM_ACCEL_VLLM_RUN"]) == 16


def test_a_file_that_cannot_be_made_costs_the_figures_alone(caplog, tmp_path, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with caplog.at_level(logging.WARNING):
        Counters(FIRST).add(3, 8)
    assert "/metrics will not show freed blocks" in caplog.text and not files()


def test_files_of_others_are_left_alone(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("somebody's")
    link = tmp_path / "llm_accel-vllm-abc-0-0"
    link.symlink_to(victim)
    with pytest.raises(OSError):
        Reader(link)
    Counters(FIRST)
    theirs = next(path for path in files() if path != link)
    monkeypatch.setattr(os, "getuid", lambda: 12345)  # the file of another user
    with pytest.raises(PermissionError):
        Reader(theirs)
    assert theirs.exists() and victim.read_text() == "somebody's"
