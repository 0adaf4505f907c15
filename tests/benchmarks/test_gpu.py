"""What of the GPU benchmark needs no GPU: cases, arguments, order, and the result file."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.ops import block_sparse_attention, column_votes, gather_entries, ragged_attention, slot_decode
from benchmarks.ops.registry import Case, Work, all_cases
from llm_accel.kernels.dispatch import all_ops

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
    monkeypatch.setattr(gpu, "run_tests", lambda seconds: {"passed": False, "seconds": 1.0, "summary": "1 failed"})
    out = tmp_path / "folder" / "gpu.json"
    assert gpu.main(["--out", str(out)], timer) == 1
    result = json.loads(out.read_text())
    assert [record["case"] for record in result["records"]] == ["one", "two"]
    assert result["left_over"] == [] and result["tests"]["summary"] == "1 failed"
    assert gpu.main(["--out", str(out), "--skip-tests", "--only", "sample"], timer) == 0


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([], timer) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_unknown_operations_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.parse(["--only", "votes"])
    assert "allowed: column_votes" in capsys.readouterr().err
