"""The benchmarks of the operations as cases: what decides about the goals first, and other depths of the software
pipeline beside the one that ships."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.gpu.timing import Timer, timer_for
from benchmarks.gpu.worker import Case as RunCase
from benchmarks.ops import block_sparse_attention, column_votes, gather_entries, hip, ragged_attention, slot_decode
from benchmarks.ops.registry import Case, Work, all_cases
from llm_accel import HiP
from llm_accel.kernels.launch import Launch

FIRST = (
    "ragged_attention: 32/8/128 B=1 T=1 kept=32768 skew 1:1",
    "block_sparse_attention: 32/8/128 prefill S=32768 block=64 budget=2048",
    "block_sparse_attention: 32/8/128 prefill S=32768 block=8 budget=2048",
    "column_votes: prefill, log-sum-exp given 32/8/128 W=32768 S=32768",
    "column_votes: prefill 32/8/128 W=32768 S=32768",
    "column_votes: prefill, log-sum-exp given 32/8/128 W=8192 S=8192",
    "hip_select: prefill, selection included, 32/8/128 S=131072",
    "hip_select: selection alone, 32/8/128 S=131072",
    "hip_select: selection alone, last stage with stride 4, 32/8/128 S=131072",
    "hip_select: decode, selection included, 32/8/128 S=131072",
    "ragged_attention: 32/8/128 B=1 T=1 kept=2048 skew 1:1",
    "slot_decode: 32/8/128 B=1 budget=2048",
    "hip_select: prefill, selection included, 32/8/128 S=32768",
    "gather_entries: 8/128 S=131072 kept=16384",
)
SMALL = HiP(sink=16, window=64, budget=64, stages=((64, None, 4), (8, 256, 1)), refresh=(4, 2), edge_layers=())


def title(case: Case) -> str:
    """What a result calls a case."""
    return f"{case.op}: {case.name}"


def dry_cases() -> list[Case]:
    """One small case of every operation, for a CPU."""
    return [
        column_votes.case("prefill", (4, 2, 16), 32, 32, given=True),
        gather_entries.case(64, 0.25),
        ragged_attention.case(128, skew=8, batch=2, stages=(4,)),
        slot_decode.case((4, 2, 16), 40, batch=2),
        block_sparse_attention.case(1200, budget=64, count=3),
        hip.case("prefill", 640, SMALL),
        hip.case("decode", 640, SMALL),
    ]


def with_variants(found: list[Case]) -> dict[str, tuple[Case, int | None]]:
    """Every case as it ships, followed by its variants; the second value is the depth of the pipeline."""
    titles: dict[str, tuple[Case, int | None]] = {}
    for case in found:
        titles[title(case)] = case, None
        titles.update({f"{title(case)}, {stages} stages": (case, stages) for stages in case.stages})
    return titles


def cases(device: str) -> dict[str, RunCase]:
    """All of them by title."""
    known = all_cases() if device.startswith("cuda") else dry_cases()
    return {
        name: partial(measure, case, stages, device, timer_for(device))
        for name, (case, stages) in with_variants(known).items()
    }


def first_names() -> tuple[str, ...]:
    """Titles in the order of what they decide."""
    known = {title(case): case for case in all_cases()}
    return tuple(with_variants([known[name] for name in FIRST]))


def measure(case: Case, stages: int | None, device: str, timer: Timer) -> Iterator[dict[str, Any]]:
    """One record: times, achieved rates, and for what ships the ratio to the baseline."""
    work = case.build(device)
    run = work.run if stages is None else variant(work, stages, device)
    median, low, high = timer(run)
    record = {"op": case.op, "problem": case.name, "stages": stages, "median_us": median * 1e6, "p20_us": low * 1e6}
    rates = {"gb_per_second": case.moved / median / 1e9, "tflop_per_second": case.flop / median / 1e12}
    yield record | {"p80_us": high * 1e6, "moved": case.moved, "flop": case.flop} | rates
    if stages is None:
        yield against(case, median, timer(work.baseline)[0])


def against(case: Case, median: float, baseline: float) -> dict[str, Any]:
    """The ratio to the baseline; per visible pair too, where that is the same kernel on more pairs."""
    same = (case.flop / median) / (case.baseline_flop / baseline) if case.baseline_flop else None
    ratios = {"speedup": baseline / median, "throughput_of_baseline": same}
    return {"baseline": case.baseline, "baseline_us": baseline * 1e6} | ratios


def variant(work: Work, stages: int, device: str) -> Callable[[], object]:
    """The same launches with another depth of the pipeline; where no kernel can run, the work as it is."""
    assert work.launches is not None
    if not device.startswith("cuda"):
        return work.run
    launches = deeper(work.launches(), stages)

    def run() -> None:
        for launch in launches:
            launch.run()

    return run


def deeper(launches: Sequence[Launch], stages: int) -> list[Launch]:
    """The launches with ``stages`` stages where they are pipelined at all."""
    return [replace(launch, stages=stages) if launch.stages > 1 else launch for launch in launches]
