"""The host side of Triton kernels: what a launch consists of, and operations that ``torch.compile`` sees as one node.

Nothing here imports Triton before a kernel is launched or compiled.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

# Bytes of shared memory that one block may have, by compute capability.
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel. The plan of an operation is a list of these; planned on meta tensors it is what the
    ahead-of-time check compiles, so that what is checked is what runs.

    Attributes:
        kernel: a ``triton.jit`` function.
        grid: programs along each axis.
        arguments: tensors, sizes and strides by parameter name; None for a tensor that a constant switches off.
        constants: compile-time constants by parameter name.
        warps: warps per program.
        stages: depth of the software pipeline.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Tensor | int | float | None]
    constants: Mapping[str, Any]
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told; multiply-add is fused whatever the default of the installed Triton is."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}

    def run(self) -> None:
        """Launches on the device of the tensors, whichever device is current."""
        if 0 in self.grid:
            return
        device = next(value.device for value in self.arguments.values() if isinstance(value, Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.kernel[self.grid](**self.arguments, **self.constants, **self.options)


def strides(prefix: str, tensor: Tensor, axes: str) -> dict[str, int]:
    """Strides of the leading axes by parameter name: ``strides("q", query, "bht")`` gives q_b, q_h and q_t."""
    return {f"{prefix}_{axis}": tensor.stride(index) for index, axis in enumerate(axes)}


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy where its last axis is not contiguous."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def ceil_div(count: int, size: int) -> int:
    """How many blocks of ``size`` hold ``count``."""
    return -(-count // size)


def next_power_of_2(count: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``count`` and ``least``."""
    return max(1 << (count - 1).bit_length() if count > 0 else 1, least)


def operation(
    name: str, plan: Callable[..., Any], fake: Callable[..., Any], changes: tuple[str, ...] = ()
) -> Callable[..., Any]:
    """The operation ``llm_accel::<name>`` of PyTorch's registry: ``torch.compile`` sees one node and traces no further.
    It has no gradient.

    Args:
        plan: from the arguments to the result, still to be filled, and the launches that fill it. Its annotations are
            the schema of the operation. The result consists of new tensors.
        fake: takes the same arguments; returns empty tensors like the result.
        changes: names of arguments that are written to; no other is changed.
    """

    def host(*arguments: Any) -> Any:
        result, launches = plan(*arguments)
        for launch in launches:
            launch.run()
        return result

    signature = inspect.signature(plan, eval_str=True)
    result, _ = get_args(signature.return_annotation)
    return as_node(name, host, fake, signature.replace(return_annotation=result), changes)


def as_node(
    name: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    signature: inspect.Signature | None = None,
    changes: tuple[str, ...] = (),
) -> Callable[..., Any]:
    """``run`` as the operation ``llm_accel::<name>``, which ``torch.compile`` does not look into. It returns new
    tensors and changes no argument but ``changes``; ``fake`` takes the same arguments and returns empty tensors like
    them."""

    def host(*arguments: Any) -> Any:
        return run(*arguments)

    host.__signature__ = signature or inspect.signature(run, eval_str=True)  # type: ignore[attr-defined]
    op = torch.library.custom_op(f"llm_accel::{name}", host, mutates_args=changes)
    op.register_fake(fake)
    return op
