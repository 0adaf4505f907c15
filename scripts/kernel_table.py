"""Compiles every kernel for every architecture and writes docs/kernels.md; no GPU is needed.

Fails when a kernel needs more shared memory than a block may have, spills registers, keeps fewer tiles in shared
memory than it should, multiplies 64 rows without the tensor cores of Hopper, or leaves place for too few warps on a
multiprocessor. With ``--check`` it writes nothing and fails when the table is old; figures of another version of Triton
are not compared. ``--summary`` writes only what this version of Triton comes to, for the page of the newest.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import triton

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for the tests, which are not part of the package

from benchmarks.gpu import operations  # noqa: E402
from benchmarks.gpu.summary import NOMINAL  # noqa: E402
from benchmarks.ops.registry import all_cases  # noqa: E402
from tests.kernels import aot  # noqa: E402

DOCUMENT = ROOT / "docs" / "kernels.md"
VERSION = f"Compiled with Triton {triton.__version__}"
INTRODUCTION = """# Kernels

Every operation has a plain-torch reference, and most have Triton kernels for NVIDIA GPUs of compute capability 8.0 and
up. Each call takes the first backend that supports its device, dtype and sizes; `llm-accel doctor` and the report name
it with the reason. `LLM_ACCEL_BACKEND="column_votes=torch,ragged_attention=triton"` chooses by hand, read once per
process: an unknown name is an error, and so is a backend that does not support the call. `TRITON_INTERPRET=1` runs the
kernels on the CPU, slowly; `make kernels` tests them that way, and `python -m benchmarks.gpu` measures them on a GPU.

"""
ROOFLINE = """## What an H200 can do, and what is reached

The operations that `python -m benchmarks.gpu` times first, for one layer of Llama-3.1-8B (32 query heads, 8 KV heads,
128 channels) in bf16: the bytes that must be moved, the floating-point operations of visible pairs, and how long these
take at the rates of an H200, {bandwidth:.1f} TB/s and {rate:.0f} TFLOP/s. The estimate allows {moved:.0%} of the
bandwidth or {computed:.0%} of the matrix rate, whichever takes longer. {measured}
"""
CONFIGURATIONS = f"""## Compiled configurations

Every configuration in `tests/kernels/compiled.py`, compiled ahead of time for each architecture. `make kernel-table`
writes this page, `make test` compiles everything again and fails when a kernel spills registers, needs more shared
memory than a block may have, keeps a single tile of pipelined loads in shared memory where it should keep two,
multiplies 64 rows or more on sm_90 without wgmma, or leaves place for fewer than two warps per scheduler where those
are needed. Constants are the kernel's compile-time parameters, tiles those in shared memory at once, products
the tensor-core instructions, programs those that fit on a multiprocessor at once. {VERSION}.
"""
VERSIONS = """## Versions of Triton

The same configurations with each version that they were compiled with; `make kernel-table-with TRITON=3.6.0` adds one.
Tiles are the fewest in shared memory at once of any configuration whose loads are pipelined.
"""
SUMMARIES = ROOT / "benchmarks" / "results" / "kernels"
COLUMNS = (
    *(
        "kernel",
        "configuration",
        "constants",
        "warps",
        "stages",
        "arch",
        "registers",
        "shared KiB",
        "tiles",
        "products",
        "programs",
    ),
)
MEASURED = ROOT / "benchmarks" / "results" / "gpu" / "summary.json"
SHARES = {"moved": 0.8, "flop": 0.5}  # of the bandwidth and of the matrix rate, in the estimates

Job = tuple[tuple[str, str], int, int]  # (operation, configuration), position in its plan, architecture


def work() -> list[Job]:
    """One job for each kernel that compiles to different code, in the order of the table."""
    jobs, seen = [], set()
    for name, launches in aot.compiled().items():
        for position, launch in enumerate(launches):
            key = aot.fingerprint(launch)
            if key not in seen:
                seen.add(key)
                jobs.extend((name, position, arch) for arch in aot.ARCHITECTURES)
    return jobs


def measure(job: Job) -> tuple[Job, aot.Usage]:
    """Compiles one kernel; the plan is made again because kernels cannot be sent to another process."""
    name, position, arch = job
    return job, aot.compile_for(aot.compiled()[name][position], arch)


def row(job: Job, usage: aot.Usage) -> tuple[str, ...]:
    """One line of the table."""
    (_, label), position, arch = job
    launch = aot.compiled()[job[0]][position]
    constants = " ".join(f"{name}={value}" for name, value in launch.constants.items())
    figures = (launch.warps, launch.stages, f"sm_{arch}", usage.registers, f"{usage.shared / 1024:.1f}")
    figures += (usage.buffers or "-", usage.products or "-", usage.resident(arch))
    return f"`{launch.kernel.__name__}`", label, constants, *map(str, figures)


def roofline() -> str:
    """Bounds and estimates of the operations that decide, and what a GPU made of them once it was measured."""
    known = {operations.title(case): case for case in all_cases()}
    found = json.loads(MEASURED.read_text(encoding="utf-8"))["operations"] if MEASURED.exists() else []
    times = {f"{one['op']}: {one['problem']}": one["median_us"] for one in found if one["stages"] is None}
    rows = [("operation", "MB", "GFLOP", "roofline us", "estimate us", "measured us"), ("---",) * 6]
    for name in operations.FIRST:
        case = known[name]
        seconds = {"moved": case.moved / NOMINAL["bytes_per_second"], "flop": case.flop / NOMINAL["flop_per_second"]}
        estimate = max(seconds[kind] / share for kind, share in SHARES.items())
        figures = (case.moved / 1e6, case.flop / 1e9, 1e6 * max(seconds.values()), 1e6 * estimate)
        reached = f"{times[name]:,.1f}" if name in times else "not yet"
        rows.append((name, *(f"{figure:,.1f}" for figure in figures), reached))
    text = ROOFLINE.format(
        bandwidth=NOMINAL["bytes_per_second"] / 1e12,
        rate=NOMINAL["flop_per_second"] / 1e12,
        moved=SHARES["moved"],
        computed=SHARES["flop"],
        measured="Measured: see `benchmarks/results/gpu`." if found else "Nothing has been measured yet.",
    )
    return text + "\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in rows) + "\n"


def summary(measured: list[tuple[Job, aot.Usage]]) -> list[dict[str, Any]]:
    """What a version of Triton makes of the kernels of each operation, per architecture."""
    rows = []
    for op in dict.fromkeys(job[0][0] for job, _ in measured):
        for arch in aot.ARCHITECTURES:
            found = [usage for job, usage in measured if job[0][0] == op and job[2] == arch]
            pipelined, tall = [one for one in found if one.wanted], [one for one in found if one.tall]
            rows.append(
                {
                    "operation": op,
                    "arch": f"sm_{arch}",
                    "kernels": len(found),
                    "unfit": sum(one.complaint(arch) is not None for one in found),
                    "spilled bytes": max(one.spilled for one in found),
                    "registers": max(one.registers for one in found),
                    "tiles": min((one.buffers for one in pipelined), default=None),
                    "64 rows by wgmma": f"{sum(one.products == 'wgmma' for one in tall)} of {len(tall)}"
                    if tall
                    else None,
                }
            )
    return rows


def versions(current: list[dict[str, Any]]) -> str:
    """The summaries of all versions, that of the installed one as ``current``."""
    known = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in SUMMARIES.glob("*.json")}
    known[f"triton-{triton.__version__}"] = current
    blocks = [VERSIONS]
    for name in sorted(known, key=lambda name: [int(part) for part in name.removeprefix("triton-").split(".")]):
        rows = known[name]
        head = ("Triton " + name.removeprefix("triton-"), *list(rows[0])[1:])
        cells = [
            [f"`{row['operation']}`", *("-" if it is None else str(it) for it in list(row.values())[1:])]
            for row in rows
        ]
        blocks.append("\n".join(f"| {' | '.join(line)} |" for line in (head, ("---",) * len(head), *cells)) + "\n")
    return "\n".join(blocks)


def document(measured: list[tuple[Job, aot.Usage]]) -> str:
    """The page: one table per operation."""
    blocks = [INTRODUCTION.rstrip() + "\n", roofline(), versions(summary(measured)), CONFIGURATIONS]
    for op in dict.fromkeys(job[0][0] for job, _ in measured):
        rows = [COLUMNS, ("---",) * len(COLUMNS), *(row(job, usage) for job, usage in measured if job[0][0] == op)]
        blocks.append(f"### {op}\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in rows) + "\n")
    return "\n".join(blocks)


def main() -> int:
    """1 when a kernel is unfit for an architecture, or when ``--check`` finds an old table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the table is old")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="compilers at once")
    parser.add_argument("--summary", action="store_true", help="write the figures of this version of Triton alone")
    args = parser.parse_args()
    jobs = work()
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        measured = list(pool.imap(measure, jobs))
    complaints = [(job, usage.complaint(job[2])) for job, usage in measured if usage.complaint(job[2])]
    for job, complaint in complaints:
        print(f"{' '.join(row(job, dict(measured)[job])[:3])} on sm_{job[2]}: {complaint}", file=sys.stderr)
    old = DOCUMENT.read_text(encoding="utf-8") if DOCUMENT.exists() else ""
    new = document(measured)
    print(f"{len(jobs)} kernels compiled, {len(complaints)} unfit")
    if args.check:
        if "Compiled with Triton" in old and f"{VERSION}." not in old:
            print(f"{DOCUMENT.name} is of another version of Triton than {triton.__version__}: figures not compared")
        elif new != old:
            print(f"docs/{DOCUMENT.name} is old; run `make kernel-table`", file=sys.stderr)
            return 1
        return 1 if complaints else 0
    SUMMARIES.mkdir(exist_ok=True)
    path = SUMMARIES / f"triton-{triton.__version__}.json"
    path.write_text(json.dumps(summary(measured), indent=2) + "\n", encoding="utf-8")
    if not args.summary:
        DOCUMENT.write_text(document(measured), encoding="utf-8")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
