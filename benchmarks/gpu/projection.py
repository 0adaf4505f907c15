"""How long a run will take, from compile times measured here: what its items compile, kernels for sm_90 and graphs of
decode steps, is compiled as on the GPU's machine, and the seconds are added to what starting, building and running are
expected to take. Seconds are those of a processor, so that other work on this machine does not count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.gpu import checks, compiling, operations
from benchmarks.gpu.compiling import Recorder, as_on_a_gpu
from benchmarks.gpu.items import Item
from llm_accel.kernels.launch import Launch

PROCESS = 9.0  # seconds until a process has imported everything and has a CUDA context
TIMING = 1.5  # seconds to build a case and time it and its baseline, largest ones included on average
CHECK = 0.5  # seconds of a check beside its compilation
FUSED = 5.0  # seconds in which 16 cores compile the kernels that Inductor writes for one graph
UNEVEN = 2.0  # how much longer the slowest of several processes takes than each of them on average


@dataclass(frozen=True)
class Projected:
    """What is expected of an item.

    Attributes:
        name: of the item.
        kernels: that it compiles and no item before it does.
        compiling: seconds for these, as measured.
        graphs: seconds for tracing and lowering its graphs, as measured.
        seconds: in all.
    """

    name: str
    kernels: int
    compiling: float
    graphs: float
    seconds: float

    def line(self) -> str:
        """For a terminal."""
        parts = [f"{self.kernels} kernels in {self.compiling:.1f} s"] if self.kernels else []
        parts += [f"graphs in {self.graphs:.1f} s"] if self.graphs else []
        return f"{self.name:<32} {self.seconds:6.0f} s  {', '.join(parts) or 'compiles nothing'}"


def kernels_of(item: Item) -> dict[str, list[Launch]]:
    """What each case of an item launches."""
    from tests.kernels.stand_ins import PLANS

    found = {}
    for name in item.cases:
        if name == checks.LSE or item.group not in ("checks", "operations"):
            continue  # none of ours
        with as_on_a_gpu(), Recorder(PLANS) as recorder:
            if item.group == "checks":
                op, arguments = checks.CHECKS[name]
                op.backends[0].run(*arguments("meta", 4096))
            else:
                case, stages = operations.with_variants(operations.all_cases())[name]
                work = case.build("meta")
                if stages is None:
                    work.run()
                elif work.launches is not None:
                    recorder.launches += operations.deeper(work.launches(), stages)
        found[name] = recorder.launches
    return found


def launches_of(item: Item) -> list[Launch]:
    """Everything that an item launches."""
    launches = [launch for found in kernels_of(item).values() for launch in found]
    if item.kernels_of_tests:
        launches += compiling.kernels_of_tests(item.command)
    return launches + compiling.kernels_of_methods(item.methods, bool(item.graphs))


def project(items: Sequence[Item]) -> Iterator[Projected]:
    """Item by item. What an item before it compiled comes from Triton's cache; graphs are compiled anew. Several
    processes share the kernels between them, and each compiles graphs of its own."""
    from tests.kernels import aot

    seen: set[str] = set()
    traced: dict[int, float] = {}
    for item in items:
        fresh = {key: launch for launch in launches_of(item) if (key := aot.fingerprint(launch)) not in seen}
        seen.update(fresh)
        spent = compiling.compile_seconds(list(fresh.values()))
        traced |= {layers: compiling.graph_seconds(layers) for layers in item.graphs if layers not in traced}
        graphs = sum(traced[layers] for layers in item.graphs)
        shared = spent if item.workers == 1 else UNEVEN * spent / item.workers
        each = {"operations": TIMING, "checks": CHECK}.get(item.group, 0.0) * len(item.cases)
        seconds = PROCESS + shared + graphs + FUSED * len(item.graphs) + each + item.running
        yield Projected(item.name, len(fresh), spent, graphs, seconds)


def print_projection(items: Sequence[Item]) -> None:
    """One line per item and the sum."""
    total = 0.0
    for found in project(items):
        total += found.seconds
        print(found.line(), flush=True)
    print(f"{'in all':<32} {total:6.0f} s = {total / 60:.1f} minutes")
