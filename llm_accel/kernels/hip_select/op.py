"""The backends of a search by stages. What a step of it computes has one name in both: ``enter``, ``level``, ``score``
and ``keep``."""

from __future__ import annotations

from types import ModuleType

from llm_accel.kernels.dispatch import Backend, Op, Problem, torch_backend, why_not_triton
from llm_accel.kernels.hip_select import launch, reference

OP = Op(
    "hip_select",
    Backend("triton", launch.score, why_not_triton, "one program per query block and run of chunks"),
    torch_backend(reference.score, "gathered keys of a few query blocks at a time"),
)


def steps(problem: Problem) -> ModuleType:
    """What computes the steps of a search for this problem."""
    return launch if OP.choose(problem).name == "triton" else reference
