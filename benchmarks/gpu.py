"""Tests of kernels and of compiled decoding, benchmarks of every operation, then whole models, on one GPU, each part
cheapest first, within ten minutes.

    python -m benchmarks.gpu --out benchmarks/results/gpu.json

The result is written after every step, so that a run that is cut short still says what it measured; what there was no
time for is named. ``--only end_to_end --minutes 40`` measures the whole models that ten minutes leave out. Times of
operations are medians with the 20 % and 80 % quantiles, the L2 cache flushed before every run; the roofline is measured
on the same GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.end_to_end import end_to_end, steps
from benchmarks.ops.registry import Case, all_cases
from llm_accel.eval.tasks.bench.bounds import measure_bounds

Timer = Callable[[Callable[[], object]], tuple[float, float, float]]  # median, 20 % and 80 % quantile in seconds
WHOLE = "end_to_end"
TESTS = ("tests/kernels", "tests/patches/test_compiled_gpu.py", "-q", "-p", "no:cacheprovider")


def gpu_timer(run: Callable[[], object]) -> tuple[float, float, float]:
    """Times one call on the current GPU."""
    from triton.testing import do_bench

    median, low, high = do_bench(run, quantiles=[0.5, 0.2, 0.8])
    return median / 1e3, low / 1e3, high / 1e3


def roofline(timer: Timer, device: str, size: int) -> dict[str, float]:
    """Bytes per second of a copy and FLOP per second of a bf16 matrix product, as measured."""
    bounds = measure_bounds(torch.device(device), torch.bfloat16, lambda run: timer(run)[0], size**2 // 2, size)
    return {"bytes_per_second": bounds.copy, "flop_per_second": bounds.flop}


def measure(case: Case, timer: Timer, device: str, limits: dict[str, float]) -> dict[str, Any]:
    """One record: times, achieved rates, share of the roofline, and the ratio to the baseline."""
    work = case.build(device)
    median, low, high = timer(work.run)
    baseline = timer(work.baseline)[0]
    bound = max(case.moved / limits["bytes_per_second"], case.flop / limits["flop_per_second"])
    same = case.baseline_flop and (case.flop / median) / (case.baseline_flop / baseline)
    return {
        "op": case.op,
        "case": case.name,
        "median_us": median * 1e6,
        "p20_us": low * 1e6,
        "p80_us": high * 1e6,
        "gb_per_second": case.moved / median / 1e9,
        "tflop_per_second": case.flop / median / 1e12,
        "roofline_percent": 100 * bound / median,
        "baseline": case.baseline,
        "baseline_us": baseline * 1e6,
        "speedup": baseline / median,
        "throughput_of_baseline": same or None,  # per visible pair, where the baseline is the same kernel
    }


def run_tests(seconds: float) -> dict[str, Any]:
    """The GPU tests in a process of their own: exit code, duration, last line."""
    started = time.monotonic()
    command = [sys.executable, "-m", "pytest", *TESTS]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"passed": False, "seconds": seconds, "summary": f"not finished after {seconds:.0f} s"}
    lines = (done.stdout + done.stderr).strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    summary = {"summary": lines[-1] if lines else "", "failed": failed}
    return {"passed": done.returncode == 0, "seconds": time.monotonic() - started, **summary}


def benchmark(
    cases: Sequence[Case], timer: Timer, device: str, deadline: float, result: dict[str, Any], save: Callable[[], None]
) -> None:
    """Measures the cases until the deadline; what is left over is named in the result."""
    result["records"], result["left_over"] = [], [f"{case.op}: {case.name}" for case in cases]
    for case in cases:
        if time.monotonic() > deadline:
            break
        try:
            record = measure(case, timer, device, result["roofline"])
        except torch.OutOfMemoryError as error:
            record = {"op": case.op, "case": case.name, "error": str(error).splitlines()[0]}
        result["records"].append(record)
        result["left_over"].pop(0)
        save()
        print(line_of(record), flush=True)


def line_of(record: dict[str, Any]) -> str:
    """One record for a terminal."""
    if "error" in record:
        return f"{record['op']:<18} {record['case']:<48} {record['error']}"
    share = f"{record['roofline_percent']:5.1f} % of roofline"
    ratio = f"{record['speedup']:5.2f} x {record['baseline']}"
    return f"{record['op']:<18} {record['case']:<48} {record['median_us']:10.1f} us {share} {ratio}"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.json"), help="result as JSON")
    parser.add_argument("--minutes", type=float, default=10.0, help="time for everything")
    parser.add_argument("--only", nargs="*", help=f"operations to measure, or {WHOLE}; all when not given")
    parser.add_argument("--skip-tests", action="store_true", help="benchmarks alone")
    args = parser.parse_args(arguments)
    known = [*sorted({case.op for case in all_cases()}), WHOLE]
    for name in args.only or ():
        if name not in known:
            parser.error(f"--only: unknown operation {name!r}; allowed: {', '.join(known)}")
    return args


def main(arguments: Sequence[str] | None = None, timer: Timer = gpu_timer) -> int:
    """1 when the GPU tests fail, 2 without a GPU."""
    args = parse(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device; torch finds none", file=sys.stderr)
        return 2
    deadline = time.monotonic() + 60 * args.minutes
    result: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}

    def save() -> None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

    if not args.skip_tests:
        result["tests"] = run_tests(60 * args.minutes / 2)
        save()
        print(result["tests"]["summary"], flush=True)
    result["roofline"] = roofline(timer, "cuda", size=8192)
    save()
    cases = [case for case in all_cases() if args.only is None or case.op in args.only]
    whole = args.only is None or WHOLE in args.only
    now = time.monotonic()
    benchmark(cases, timer, "cuda", (now + deadline) / 2 if whole else deadline, result, save)
    save()
    torch.cuda.empty_cache()
    if whole:
        end_to_end(steps(), args.out.with_suffix(""), deadline, result, save)
    return 0 if args.skip_tests or result["tests"]["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
