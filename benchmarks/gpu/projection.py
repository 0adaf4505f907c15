"""How long a run will take, from compile times measured here: the kernels of the first items are compiled for sm_90, as
the GPU's machine will, and the seconds are added to what starting, building and timing are expected to take."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu import checks, operations
from benchmarks.gpu.items import Item
from llm_accel.kernels import dispatch
from llm_accel.kernels.block_sparse import launch as block_sparse
from llm_accel.kernels.column_votes import launch as column_votes
from llm_accel.kernels.compaction import launch as compaction
from llm_accel.kernels.hip_select import launch as hip_select
from llm_accel.kernels.launch import Launch
from llm_accel.kernels.ragged_decode import launch as ragged_decode
from llm_accel.kernels.slot_decode import launch as slot_decode
from llm_accel.kernels.slot_write import launch as slot_write

ARCH = 90
PROCESS = 9.0  # seconds until a process has imported everything and has a CUDA context
TIMING = 1.5  # seconds to build a case and time it and its baseline, largest ones included on average
CHECK = 0.5  # seconds of a check beside its compilation


PLANS = {
    "block_sparse_attention": block_sparse.plan,
    "column_votes": column_votes.plan,
    "gather_entries": compaction.plan,
    "hip_enter": hip_select.plan_enter,
    "hip_keep": hip_select.plan_keep,
    "hip_level": hip_select.plan_level,
    "hip_stage_score": hip_select.plan,
    "ragged_attention": ragged_decode.plan,
    "slot_decode": slot_decode.plan,
    "slot_write": slot_write.plan,
}


class Recorder(TorchDispatchMode):
    """Our operations on tensors without data: their launches are collected, whatever the device."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plan = PLANS.get(func._opname) if func.namespace == "llm_accel" else None
        if plan is None:
            return func(*args, **(kwargs or {}))
        result, launches = plan(*args, **(kwargs or {}))
        self.launches += launches
        return result


def kernels_of(item: Item) -> dict[str, list[Launch]]:
    """What each case of an item launches."""
    found = {}
    for name in item.cases:
        if name == checks.LSE:
            continue  # none of ours
        with mock.patch.object(dispatch, "_why_no_triton", lambda device: None), Recorder() as recorder:
            if item.group == "checks":
                op, arguments = checks.CHECKS[name]
                op.backends[0].run(*arguments("meta", 4096))
            elif item.group == "operations":
                case, stages = operations.with_variants(operations.all_cases())[name]
                work = case.build("meta")
                if stages is None:
                    work.run()
                elif work.launches is not None:
                    recorder.launches += operations.deeper(work.launches(), stages)
        found[name] = recorder.launches
    return found


def project(items: Sequence[Item]) -> Iterator[tuple[str, int, float, float]]:
    """Item, kernels compiled, seconds for that as measured, and seconds in all. What an item before it compiled comes
    from Triton's cache."""
    from tests.kernels import aot

    seen: set[str] = set()
    for item in items:
        if item.group not in ("checks", "operations"):
            yield item.name, 0, 0.0, item.seconds
            continue
        launches = [launch for found in kernels_of(item).values() for launch in found]
        fresh = {key: launch for launch in launches if (key := aot.fingerprint(launch)) not in seen}
        seen.update(fresh)
        spent = compile_seconds(list(fresh.values()))
        each = TIMING if item.group == "operations" else CHECK
        yield item.name, len(fresh), spent, PROCESS + spent + each * len(item.cases)


def compile_seconds(launches: Sequence[Launch]) -> float:
    """Seconds to compile kernels that no cache has."""
    from triton import knobs

    from tests.kernels import aot

    with tempfile.TemporaryDirectory() as place, knobs.cache.scope():
        knobs.cache.dir = place
        begin = time.monotonic()
        for launch in launches:
            aot.compile_for(launch, ARCH)
        return time.monotonic() - begin


def print_projection(items: Sequence[Item]) -> None:
    """One line per item and the sum."""
    total = 0.0
    for name, count, spent, seconds in project(items):
        total += seconds
        compiled = f"{count} kernels compiled in {spent:.1f} s" if count else "as expected, not measured here"
        print(f"{name:<32} {seconds:6.0f} s  {compiled}", flush=True)
    print(f"{'in all':<32} {total:6.0f} s = {total / 60:.1f} minutes")
