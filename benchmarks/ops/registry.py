"""What a benchmark of an operation declares, and all of them, cheapest first."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

import torch

import benchmarks.ops
from llm_accel.kernels.launch import Launch

# Speeds that order the cases; results are compared with measured ones.
BYTES_PER_SECOND = 3e12
FLOP_PER_SECOND = 5e14


@dataclass(frozen=True)
class Work:
    """One problem in the memory of a device.

    Attributes:
        run: the operation, through the function that users call.
        baseline: what is timed beside it.
        launches: the launches of ``run``, for variants of them.
    """

    run: Callable[[], object]
    baseline: Callable[[], object]
    launches: Callable[[], list[Launch]] | None = None


@dataclass(frozen=True)
class Case:
    """One problem of one operation.

    Attributes:
        op: name of the operation.
        name: what is special about the problem.
        build: allocates it on a device.
        baseline: what the baseline is.
        moved: bytes that must be read and written at least.
        flop: floating-point operations on visible pairs.
        baseline_flop: those of the baseline, where it is the same kernel on more pairs; else 0.
        stages: depths of the software pipeline that are measured beside the shipped one.
    """

    op: str
    name: str
    build: Callable[[str], Work]
    baseline: str
    moved: int
    flop: int = 0
    baseline_flop: int = 0
    stages: tuple[int, ...] = ()

    @property
    def bound(self) -> float:
        """Seconds that a large GPU needs at least, roughly."""
        return max(self.moved / BYTES_PER_SECOND, self.flop / FLOP_PER_SECOND)


def captured(run: Callable[[], object], device: str) -> Callable[[], object]:
    """The same as one CUDA graph, so that no launch is waited for; unchanged elsewhere."""
    if not device.startswith("cuda"):
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are compiled before anything is captured
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def all_cases() -> list[Case]:
    """The cases of every module beside this one, cheapest first."""
    names = [module.name for module in pkgutil.iter_modules(benchmarks.ops.__path__) if module.name != "registry"]
    found = [importlib.import_module(f"benchmarks.ops.{name}").CASES for name in names]
    return sorted((case for cases in found for case in cases), key=lambda case: case.bound)
