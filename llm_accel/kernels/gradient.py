"""Operations without a gradient: they run wherever gradients are recorded, and refuse only when one is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llm_accel.errors import UnsupportedCallError


def is_recorded(*inputs: Tensor | None) -> bool:
    """Whether autograd records what is computed from these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)


def without_gradient(
    operation: str, run: Callable[[], tuple[Tensor, ...]], *inputs: Tensor | None
) -> tuple[Tensor, ...]:
    """What ``run`` computes from ``inputs``. Going backward through it raises :class:`UnsupportedCallError`."""
    if torch.compiler.is_compiling() or not is_recorded(*inputs):
        return run()
    with torch.no_grad():
        outputs = run()
    return tuple(_Refusal.apply(output, operation, *inputs) for output in outputs)  # type: ignore[no-untyped-call]


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, operation: str, *inputs: Tensor | None) -> Tensor:
        ctx.operation = operation
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise UnsupportedCallError(
            f"{ctx.operation} has no gradient here, so backward cannot pass through the attention of this method; "
            "compute the loss inside handle.disabled() on a new cache, or call llm_accel.remove(model) first."
        )
