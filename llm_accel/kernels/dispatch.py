"""Which implementation of an operation runs: the first that supports the problem, or the one that the user names.

``LLM_ACCEL_BACKEND="column_votes=torch,ragged_attention=triton"`` names them, one per operation. It is read once, at
the first use of any operation. An unknown name is an error, and so is a named backend that does not support the
problem.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import llm_accel.kernels
from llm_accel.errors import ConfigError, unknown_name

VARIABLE = "LLM_ACCEL_BACKEND"
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TRITON_HEAD_DIM = 256


@dataclass(frozen=True)
class Problem:
    """What decides between backends. Operations with further limits derive a class with more fields.

    Attributes:
        device: where the tensors are.
        dtype: of queries, keys and values.
        head_dim: channels per head, the largest of queries, keys and values.
        group: query heads per key head.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    group: int = 1

    @staticmethod
    def of(query: Tensor, key: Tensor, value: Tensor | None = None) -> Problem:
        """The problem of attention over [B, Hq, T, D], [B, H, S, D] and [B, H, S, Dv]."""
        head_dim = query.shape[-1] if value is None else max(query.shape[-1], value.shape[-1])
        return Problem(query.device, query.dtype, head_dim, query.shape[1] // key.shape[1])


@dataclass(frozen=True)
class Backend:
    """One implementation of an operation.

    Attributes:
        name: what ``LLM_ACCEL_BACKEND`` calls it.
        run: takes the operation's arguments in order.
        why_not: the reason why it does not support a problem, or None if it does. It looks at the problem alone.
        about: one line for the report.
    """

    name: str
    run: Callable[..., Any]
    why_not: Callable[[Any], str | None]
    about: str


class Op:
    """An operation with its backends, the preferred one first and the plain-torch reference last."""

    def __init__(self, name: str, *backends: Backend) -> None:
        self.name, self.backends = name, backends

    def choose(self, problem: Problem) -> Backend:
        """The backend for this problem; ConfigError if the user asks for one that does not support it."""
        wanted = requested(self.name)
        for backend in self.backends:
            if wanted is not None and backend.name != wanted:
                continue
            reason = backend.why_not(problem)
            if reason is None:
                return backend
            if wanted is not None:
                raise ConfigError(
                    f"{VARIABLE} asks for {self.name}={wanted}, which does not work here: {reason}. "
                    f"Take {self.name} out of {VARIABLE}, or give one of: {', '.join(b.name for b in self.backends)}."
                )
        raise ConfigError(f"{self.name}: no backend supports {problem}.")

    def explain(self, problem: Problem) -> tuple[str, str]:
        """Name of the backend for this problem, and why it is this one."""
        chosen = self.choose(problem)
        if requested(self.name) is not None:
            return chosen.name, f"{chosen.about}; asked for by {VARIABLE}"
        refused = [(backend, backend.why_not(problem)) for backend in self.backends]
        reasons = [f"no {backend.name}: {reason}" for backend, reason in refused if reason is not None]
        return chosen.name, "; ".join([chosen.about, *reasons])


def torch_backend(run: Callable[..., Any], about: str) -> Backend:
    """The plain-torch backend, which supports everything."""
    return Backend("torch", run, lambda problem: None, f"plain-torch reference, {about}")


def why_not_triton(problem: Problem) -> str | None:
    """Why Triton kernels for attention heads do not support this problem, or None."""
    reason: str | None = why_no_triton(problem.device)
    if reason is not None:
        return reason
    if problem.dtype not in TRITON_DTYPES:
        return f"the kernel takes fp16, bf16 and fp32, not {problem.dtype}"
    if problem.head_dim > TRITON_HEAD_DIM:
        return f"the kernel takes up to {TRITON_HEAD_DIM} channels per head, not {problem.head_dim}"
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def why_no_triton(device: torch.device) -> str | None:
    """Why no Triton kernel can run on this device, or None. On a CPU they run under Triton's interpreter alone."""
    return _why_no_triton(device)


@functools.cache
def _why_no_triton(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu":
        return None if interpreting() else "the tensors are on the CPU"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the kernels are written for NVIDIA GPUs, not for {'AMD' if device.type == 'cuda' else device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the GPU has compute capability {major}.{minor}, the kernels need 8.0"
    from triton.backends import backends

    if "nvidia" not in backends or not backends["nvidia"].driver.is_active():
        return "triton finds no active NVIDIA driver"
    return None


@functools.cache
def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels; Triton reads the variable when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes")


def all_ops() -> dict[str, Op]:
    """Every operation by name."""
    packages = [module.name for module in pkgutil.iter_modules(llm_accel.kernels.__path__) if module.ispkg]
    found = [importlib.import_module(f"llm_accel.kernels.{name}").OP for name in packages]
    return {op.name: op for op in found}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def requested(op: str) -> str | None:
    """The backend that the user names for an operation, or None."""
    return _requests().get(op)


@functools.cache
def _requests() -> dict[str, str]:
    """``LLM_ACCEL_BACKEND`` as {operation: backend}, checked."""
    entries = [entry.strip() for entry in os.environ.get(VARIABLE, "").split(",") if entry.strip()]
    requests: dict[str, str] = {}
    for entry in entries:
        op, separator, backend = (part.strip() for part in entry.partition("="))
        if not separator:
            raise ConfigError(f"{VARIABLE}: {entry!r} is not of the form operation=backend.")
        if op in requests:
            raise ConfigError(f"{VARIABLE} names {op} twice; give one backend per operation.")
        if op not in all_ops():
            raise ConfigError(f"{VARIABLE}: {unknown_name('operation', op, all_ops())}")
        names = [known.name for known in all_ops()[op].backends]
        if backend not in names:
            raise ConfigError(f"{VARIABLE}: {unknown_name(f'backend of {op}', backend, names)}")
        requests[op] = backend
    return requests
