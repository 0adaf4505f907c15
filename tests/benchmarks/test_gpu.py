"""What of the GPU benchmark needs no GPU: cases, arguments, order, and the result file."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.end_to_end import Step, bench_settings, end_to_end, run_process, steps
from benchmarks.ops import block_sparse_attention, column_votes, gather_entries, hip, ragged_attention, slot_decode
from benchmarks.ops.registry import Case, Work, all_cases
from benchmarks.trace import trace, waits
from llm_accel import HiP
from llm_accel.kernels.dispatch import all_ops
from tests.tiny import tiny_model

SMALL = HiP(sink=16, window=64, budget=64, stages=((64, None, 4), (8, 256, 1)), refresh=(4, 2), edge_layers=())
LIMITS = {"bytes_per_second": 1e12, "flop_per_second": 1e14}


def timer(run: Any) -> tuple[float, float, float]:
    """Runs once and claims a millisecond."""
    run()
    return 1e-3, 0.9e-3, 1.2e-3


def case(name: str, moved: int = 10**8) -> Case:
    return Case("sample", name, lambda device: Work(lambda: None, lambda: None), "nothing", moved, flop=10**10)


def test_every_case_is_of_a_known_operation_and_they_are_sorted() -> None:
    cases = all_cases()
    measured = {"block_sparse_attention", "column_votes", "ragged_attention", "gather_entries", "slot_decode"}
    assert measured <= {case.op for case in cases} <= set(all_ops())
    assert [case.bound for case in cases] == sorted(case.bound for case in cases)
    assert len({(case.op, case.name) for case in cases}) == len(cases)
    assert all(case.moved > 0 for case in cases)


@pytest.mark.parametrize(
    "small",
    [
        column_votes.case("prefill", (4, 2, 16), 32, 32),
        column_votes.case("window", (4, 2, 16), 8, 64, softcap=5.0),
        gather_entries.case(64, 0.25),
        ragged_attention.case(128, skew=8, batch=2),
        slot_decode.case((4, 2, 16), 40, batch=2),
        block_sparse_attention.case(1200, budget=64, count=3),
        block_sparse_attention.prefill(1280, 64, budget=128),
        hip.case("prefill", 640, SMALL),
        hip.case("decode", 640, SMALL),
    ],
    ids=lambda small: small.op,
)
def test_problems_can_be_built_and_run(small: Case) -> None:
    work = small.build("cpu")
    work.run()
    work.baseline()


def test_a_record_compares_with_the_measured_roofline() -> None:
    record = gpu.measure(case("one"), timer, "cpu", LIMITS)
    assert record["median_us"] == pytest.approx(1000)
    assert record["gb_per_second"] == pytest.approx(100)
    assert record["tflop_per_second"] == pytest.approx(10)
    assert record["roofline_percent"] == pytest.approx(10)
    assert record["speedup"] == 1.0
    assert "10.0 % of roofline" in gpu.line_of(record)


def test_roofline_counts_both_directions_of_a_copy() -> None:
    limits = gpu.roofline(timer, "cpu", size=64)
    assert limits == {"bytes_per_second": 2 * 64 * 64 * 2 / 1e-3, "flop_per_second": 2 * 64**3 / 1e-3}


def test_what_is_left_at_the_deadline_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result: dict[str, Any] = {"roofline": LIMITS}
    saved: list[str] = []
    cases = [case("one"), case("two"), case("three")]

    def slow(run: Any) -> tuple[float, float, float]:
        time.sleep(0.03)
        return timer(run)

    deadline = time.monotonic() + 0.01
    gpu.benchmark(cases, slow, "cpu", deadline, result, lambda: saved.append(json.dumps(result)))
    assert [record["case"] for record in result["records"]] == ["one"]
    assert result["left_over"] == ["sample: two", "sample: three"]
    assert json.loads(saved[0])["records"][0]["case"] == "one"
    assert "one" in capsys.readouterr().out


def test_a_problem_that_does_not_fit_is_recorded() -> None:
    def build(device: str) -> Work:
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore text")

    result: dict[str, Any] = {"roofline": LIMITS}
    gpu.benchmark([Case("sample", "huge", build, "", 1)], timer, "cpu", time.monotonic() + 9, result, lambda: None)
    assert result["records"] == [{"op": "sample", "case": "huge", "error": "CUDA out of memory."}]


def test_a_whole_run_with_another_timer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(gpu, "all_cases", lambda: [case("one"), case("two")])
    monkeypatch.setattr(gpu, "roofline", lambda timer, device, size: LIMITS)
    monkeypatch.setattr(gpu, "steps", lambda: [])
    monkeypatch.setattr(gpu, "run_tests", lambda seconds: {"passed": False, "seconds": 1.0, "summary": "1 failed"})
    out = tmp_path / "folder" / "gpu.json"
    assert gpu.main(["--out", str(out)], timer) == 1
    result = json.loads(out.read_text())
    assert [record["case"] for record in result["records"]] == ["one", "two"]
    assert result["left_over"] == [] and result["tests"]["summary"] == "1 failed"
    assert result["end_to_end"] == [] and result["no_time_for"] == {}
    assert gpu.main(["--out", str(out), "--skip-tests", "--only", "sample"], timer) == 0


def test_whole_models_run_cheapest_first_and_what_there_is_no_time_for_is_named() -> None:
    planned = steps()
    assert [step.seconds for step in planned] == sorted(step.seconds for step in planned)
    assert {"trace", "16k", "128k", "batch 8 at 64k"} <= {step.name for step in planned}
    for step in planned:
        if step.module == "llm_accel":
            settings = bench_settings(step.arguments[1:])
            assert settings.shape == "llama-3.1-8b" and settings.candidates[0].name == "dense"
    assert sum(step.seconds for step in planned[:3]) < 600


def test_a_step_that_fails_or_is_too_long_does_not_stop_the_others(tmp_path: Path) -> None:
    planned = [
        Step("small, one", "llm_accel", ("bench",), 1),
        Step("broken", "llm_accel", (), 2),
        Step("huge", "x", (), 99),
    ]
    commands: list[list[str]] = []

    def run(command: Sequence[str], seconds: float) -> str | None:
        commands.append(list(command))
        folder = Path(command[-1])
        if folder.name == "broken":
            return "torch.OutOfMemoryError: too large"
        folder.mkdir(parents=True)
        (folder / "bench.json").write_text('{"cells": []}')
        return None

    result: dict[str, Any] = {}
    saved: list[str] = []
    end_to_end(planned, tmp_path, time.monotonic() + 50, result, lambda: saved.append(json.dumps(result)), run)
    assert [command[1:4] for command in commands] == [["-m", "llm_accel", "bench"], ["-m", "llm_accel", "--out"]]
    assert result["end_to_end"][0]["result"] == {"cells": []}
    assert result["end_to_end"][1]["error"] == "torch.OutOfMemoryError: too large"
    assert result["no_time_for"] == {"huge": "about 99 s"}
    assert "broken" not in saved[0] and "broken" in saved[1] and "huge" in saved[-1]


def test_a_process_says_what_went_wrong() -> None:
    assert run_process([sys.executable, "-c", "pass"], 60) is None
    assert run_process([sys.executable, "-c", "raise SystemExit('no memory')"], 60) == "no memory"
    assert run_process([sys.executable, "-c", "import time; time.sleep(9)"], 0.1) == "not finished after 0 s"


@torch.no_grad()
def test_a_trace_counts_what_makes_the_host_wait(tmp_path: Path) -> None:
    assert waits(["cudaStreamSynchronize", "aten::mm", "Memcpy DtoH (Device -> Pinned)", "cudaStreamSynchronize"]) == {
        "cudaStreamSynchronize": 2,
        "Memcpy DtoH": 1,
    }
    found = trace(tiny_model("llama"), "snapkv:budget=24,window=8", "eager", 40, 2, tmp_path)
    assert found["waits"] == {}
    assert (tmp_path / "trace.json.gz").stat().st_size > 0


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([], timer) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_unknown_operations_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.parse(["--only", "votes"])
    assert "allowed: block_sparse_attention, column_votes" in capsys.readouterr().err
