"""What of the GPU benchmark needs no GPU: cases, items, how failures are survived, and the result."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.end_to_end import bench_settings, steps
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import checks, compiling, faults, operations, plan, projection, yardsticks
from benchmarks.gpu.items import OUT, Item, junit_lines
from benchmarks.gpu.journal import END, LINE, Journal, Tail
from benchmarks.gpu.runner import Run, run_items
from benchmarks.gpu.summary import NOMINAL, summarize
from benchmarks.ops import block_sparse_attention, column_votes, gather_entries, hip, ragged_attention, slot_decode
from benchmarks.ops.registry import Case, Work, all_cases
from benchmarks.trace import trace, waits
from llm_accel.kernels.dispatch import all_ops, interpreting
from tests.tiny import tiny_model

SMALL = operations.SMALL


def timer(run: Any) -> tuple[float, float, float]:
    """Runs once and claims a millisecond."""
    run()
    return 1e-3, 0.9e-3, 1.2e-3


def ended(records: list[dict[str, Any]]) -> dict[str, Any]:
    """What each case, or item without cases, ended with: None, or an error."""
    return {record.get("case", record["item"]): record["error"] for record in records if record["event"] == END}


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
        column_votes.case("prefill", (4, 2, 16), 32, 32, given=True),
        column_votes.case("window", (4, 2, 16), 8, 64, softcap=5.0),
        gather_entries.case(64, 0.25),
        ragged_attention.case(128, skew=8, batch=2),
        slot_decode.case((4, 2, 16), 40, batch=2),
        block_sparse_attention.case(1200, budget=64, count=3),
        block_sparse_attention.prefill(1280, 64, budget=128),
        hip.case("prefill", 640, SMALL),
        hip.case("decode", 640, SMALL),
        hip.case("select", 640, SMALL),
    ],
    ids=lambda small: small.op,
)
def test_problems_can_be_built_and_run(small: Case) -> None:
    work = small.build("cpu")
    work.run()
    work.baseline()


def test_a_dry_run_walks_every_item_and_survives_every_failure(tmp_path: Path, capsys: Any) -> None:
    assert gpu.main(["--dry-run", "--inject", "--minutes", "8", "--out", str(tmp_path)]) == 1
    records = Journal(tmp_path / "results.jsonl").records()
    results = ended(records)
    failed = {
        "error": "ValueError: a shape",
        "sticky error": "illegal memory",
        "crash": "SIGSEGV",
        "hang": "not finished",
    }
    assert all(text in results.pop(name) for name, text in failed.items())
    assert results.pop("injected failures") == "4 of 8 failed"
    assert not any(results.values()), {name: error for name, error in results.items() if error}
    every = {name for item in plan.dry_items() for name in (item.name, *item.cases)}
    assert every | {f"sound after {name}" for name in failed} == set(results)
    values = {record["case"]: record["value"] for record in records if record["event"] == LINE and "value" in record}
    assert values["error"] == 2 and values["hang"] == 3  # what was measured before a failure is there
    tests = [record for record in records if record["event"] == LINE and record["item"] == "tests of kernels"]
    assert tests[0]["tests"] > 0 == tests[0]["failures"]
    cells = [record["cell"]["name"] for record in records if "cell" in record]
    assert cells[:2] == ["dense", "snapkv:budget=64"]
    found = json.loads((tmp_path / "summary.json").read_text())
    assert set(found["roofline"]["measured"]) == set(NOMINAL) and len(found["failed"]) == 4
    assert {line["op"] for line in found["operations"]} == {case.op for case in operations.dry_cases()}
    assert "% of roofline" in capsys.readouterr().out


def test_the_first_items_fit_and_their_cases_are_known() -> None:
    first, later = plan.first_items(), plan.later_items()
    assert sum(item.seconds for item in first) <= 60 * 8.5
    assert len({item.name for item in (*first, *later)}) == len(first) + len(later)
    for item in (*first, *later, *plan.dry_items(), plan.injected()):
        assert bool(item.command) != bool(item.cases) and 0 < item.seconds <= item.limit
    assert set(plan.first_items()[0].cases) == set(yardsticks.cases("cuda"))
    assert set(checks.NAMES) == set(checks.cases("cpu")) and set(faults.NAMES) == set(faults.cases("cpu"))
    in_all = [name for item in (*first, *later) if item.group == "operations" for name in item.cases]
    assert sorted(in_all) == sorted(operations.cases("cuda"))
    whole = [item for item in first if "bench" in item.command]
    settings = [bench_settings(item.command[3:]) for item in whole]
    assert all(one.rounds == 1 and not any(c.decode == "static" for c in one.candidates) for one in settings)


def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    run = Run(tmp_path, time.monotonic() + 1.5, "cpu")
    slow = Item("slow", 0.1, 0.3, command=("-c", "import time; print('begun', flush=True); time.sleep(60)"))
    later = Item("later", 600, 900, command=("-c", "pass"))
    hang = Item("cases", 0.1, 9, group="faults", cases=("sound after error", "hang", "error"), case_limit=99)
    run_items([slow, later, hang], run)
    results = ended(run.journal.records())
    assert results["slow"] == "not finished after 0 s" and "it takes about 600 s" in results["later"]
    left_over = [name for record in run.journal.records() for name in record.get("left_over", ())]
    assert "error" in left_over and "left over" in results["cases"]
    assert "begun" in (tmp_path / "run.log").read_text()


def test_a_group_that_cannot_be_imported_is_tried_once(tmp_path: Path) -> None:
    run = Run(tmp_path, time.monotonic() + 60, "cpu")
    run_items([Item("broken", 1, 60, group="no_such_module", cases=("one", "two"), case_limit=9)], run)
    results = ended(run.journal.records())
    assert results["one"] == results["two"] == "exit code 1" and results["broken"] == "2 of 2 failed"
    assert (tmp_path / "run.log").read_text().count("$ python") == 1


def test_a_command_keeps_what_it_wrote_before_it_failed(tmp_path: Path) -> None:
    def lines(folder: Path) -> Iterator[dict[str, Any]]:
        yield {"text": (folder / "result").read_text()}

    code = f"import pathlib, sys; pathlib.Path(r'{OUT}/result').write_text('half'); sys.exit(7)"
    run = Run(tmp_path, time.monotonic() + 60, "cpu")
    run_items([Item("half", 1, 60, command=("-c", code), lines=lines)], run)
    records = run.journal.records()
    assert [record["text"] for record in records if "text" in record] == ["half"]
    assert ended(records) == {"half": "exit code 7"}


def test_failures_of_a_test_run_are_read(tmp_path: Path) -> None:
    (tmp_path / "tests.xml").write_text(
        '<testsuites><testsuite tests="2" failures="1" errors="0" skipped="0"><testcase classname="a" name="good"/>'
        '<testcase classname="a" name="bad"><failure message="wrong number"/></testcase></testsuite></testsuites>'
    )
    counts, failure = junit_lines(tmp_path)
    assert counts == {"tests": 2, "failures": 1, "errors": 0, "skipped": 0}
    assert failure == {"test": "a::bad", "error": "wrong number"}


def test_half_a_line_is_read_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    tail = Tail(path)
    path.write_text('{"item": "one"}\n{"item": ')
    assert [record["item"] for record in tail.new()] == ["one"]
    with path.open("a") as file:
        file.write('"two"}\n')
    assert [record["item"] for record in tail.new()] == ["two"]


def test_a_wrong_kernel_is_found() -> None:
    def wrong(query: torch.Tensor, *rest: Any) -> torch.Tensor:
        return torch.empty(query.shape[0], query.shape[2], query.shape[1], 128)  # never written

    op, arguments = checks.CHECKS["ragged decode"]
    assert next(iter(checks.check(op, arguments, "cpu", 256)))["errors"][0] < checks.TOLERANCE
    exact, broken = torch.ones(4), torch.tensor([1.0, torch.nan, 1.0, 1.0])
    assert checks.difference(exact * 1.001, exact) == pytest.approx(1e-3, rel=1e-2)
    assert checks.difference(broken, exact) == float("inf")
    with checks.poisoned():
        assert wrong(torch.ones(1, 4, 1, 8)).isnan().all()


def test_a_record_compares_with_the_measured_roofline() -> None:
    case = Case("sample", "one", lambda device: Work(lambda: None, lambda: None), "nothing", 10**8, flop=10**10)
    own, ratio = operations.measure(case, None, "cpu", timer)
    assert own["median_us"] == pytest.approx(1000) and own["gb_per_second"] == pytest.approx(100)
    assert own["tflop_per_second"] == pytest.approx(10) and ratio["speedup"] == 1.0
    limits = (
        {"item": "y", "event": LINE, "bytes_per_second": 1e12},
        {"item": "y", "event": LINE, "flop_per_second": 1e14},
    )
    found = summarize([*limits, {"item": "operations", "event": LINE, **own}])
    assert found["operations"][0]["roofline_percent"] == pytest.approx(10)
    assert found["lines"][0].endswith("10.0 % of roofline")


@pytest.mark.skipif(interpreting(), reason="interpreted kernels are not compiled")
def test_the_projection_knows_what_a_case_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = Item("checks", 1, 9, group="checks", cases=checks.NAMES, case_limit=1)
    kernels = projection.kernels_of(checked)
    assert all(kernels.values()) and kernels["gather"][0].kernel.__name__ == "gather_kernel"
    measured = Item("operations", 1, 9, group="operations", cases=operations.first_names(), case_limit=1)
    deep = projection.kernels_of(measured)
    name = next(name for name in measured.cases if name.endswith(", 5 stages"))
    assert max(launch.stages for launch in deep[name]) == 5
    monkeypatch.setattr(compiling, "compile_seconds", len)
    monkeypatch.setattr(compiling, "graph_seconds", lambda layers: 10.0 * layers)
    traced = Item("trace", 1, 9, command=("-m", "x"), running=3, methods=("h2o",), graphs=(2, 2))
    first, second, third = projection.project([checked, checked, traced])
    assert first.kernels > 10 and second.kernels == 0 and second.seconds < first.seconds
    assert third.graphs == 40 and third.seconds > 40 + 3 and "graphs in 40.0 s" in third.line()


@pytest.mark.skipif(interpreting(), reason="interpreted kernels are not compiled")
def test_kernels_of_whole_models_and_of_tests_are_known() -> None:
    names = {launch.kernel.__name__ for launch in compiling.kernels_of_methods(["hip"], compiled=False)}
    assert {"stage_score_kernel", "keep_kernel", "level_kernel", "enter_kernel", "block_sparse_kernel"} <= names
    names = {launch.kernel.__name__ for launch in compiling.kernels_of_methods(["snapkv"], compiled=True)}
    assert {"col_scores_kernel", "gather_kernel", "split_kernel"} <= names
    tests = (
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-n",
        "2",
        "tests/kernels/triton_kernels",
        "-k",
        "several_blocks",
    )
    launches = compiling.kernels_of_tests(tests)
    assert {"gather_kernel", "write_kernel"} <= {launch.kernel.__name__ for launch in launches}
    assert all(launch.kernel.params for launch in launches)  # what the compiler takes, not the interpreter


def test_every_first_item_says_what_it_compiles_and_how_long_it_runs() -> None:
    for item in plan.first_items():
        assert item.cases or (item.running > 0 and (item.methods or item.graphs or item.kernels_of_tests))


def test_whole_models_run_cheapest_first() -> None:
    planned = steps()
    assert [step.seconds for step in planned] == sorted(step.seconds for step in planned)
    assert {"trace", "16k", "128k", "batch 8 at 64k"} <= {step.name for step in planned}
    for step in planned:
        if step.module == "llm_accel":
            settings = bench_settings(step.arguments[1:])
            assert settings.shape == "llama-3.1-8b" and settings.candidates[0].name == "dense"


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
    assert gpu.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_unknown_items_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.parse(["--only", "votes"])
    assert "allowed: yardsticks, checks" in capsys.readouterr().err
