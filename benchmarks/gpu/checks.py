"""One launch of each kernel in bf16 against its plain-torch reference in fp32, on memory full of NaN: whether it works
at all, before anything is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.worker import Case
from benchmarks.ops import block_sparse_attention as block_sparse
from benchmarks.ops import ragged_attention as ragged
from llm_accel.kernels import block_sparse as block_sparse_op
from llm_accel.kernels import column_votes, compaction, hip_select, ragged_decode, slot_decode, slot_write
from llm_accel.kernels.dispatch import Op
from llm_accel.kernels.hip_select import Keys, launch, reference
from llm_accel.patches.attention_lse import with_lse

QUERY_HEADS, HEADS, DIM = 32, 8, 128
TOLERANCE = 5e-3  # RMS of the error over RMS of the reference, as in the tests
Arguments = Callable[[str, int], Sequence[Any]]  # of an operation, in order, on a device; the second is the length


def votes(width: int | None, device: str, slots: int) -> Sequence[Any]:
    query = _normal(device, QUERY_HEADS, width or slots)
    return query, _normal(device, HEADS, slots), None, HEADS, DIM**-0.5, None, None, "sum", None, None


def prompt(block_k: int, device: str, slots: int) -> Sequence[Any]:
    lists, tensors = block_sparse.prompt_problem(slots, slots // 4, block_k, slots // 8, device)
    return *tensors, lists, None, DIM**-0.5, None, None


def one_query(device: str, slots: int) -> Sequence[Any]:
    lists, tensors = block_sparse.step_problem(1, slots, slots // 4, 1, slots // 8, device)
    return *tensors, lists, None, DIM**-0.5, None, None


def decode(count: int, device: str, slots: int) -> Sequence[Any]:
    return *ragged.problem(1, slots, 8, count, device), DIM**-0.5, None, None


def slots_of_a_budget(device: str, slots: int) -> Sequence[Any]:
    key, value = _normal(device, HEADS, slots), _normal(device, HEADS, slots)
    scores, order = torch.rand(2, 1, HEADS, slots, device=device).unbind(0)
    rest = (None, DIM**-0.5, None, None, 1.0, 4, slots // 2, False)
    return _normal(device, QUERY_HEADS, 1), key, value, scores, order.argsort(-1), *rest


def kept(device: str, slots: int) -> Sequence[Any]:
    order = torch.rand(1, HEADS, slots, device=device)
    indices = order.topk(slots // 4).indices.sort(-1).values
    return indices, _normal(device, HEADS, slots), _normal(device, HEADS, slots), order


def stage(chunk: int, queries: int, exact: bool, device: str, slots: int) -> Sequence[Any]:
    keys = Keys.of(_normal(device, HEADS, slots), None)
    starts = torch.arange(0, slots, chunk, device=device).expand(1, HEADS, 4, -1).contiguous()
    representative = torch.randn(1, HEADS, 4, queries, DIM, device=device).bfloat16().float()
    end = torch.full((1, 1, 4, 1), slots - chunk, device=device)
    level = torch.randn(1, HEADS, 4, queries, device=device) if queries > 1 else None
    return representative, keys, starts, end, chunk, exact, level


def levels(device: str, slots: int) -> Sequence[Any]:
    keys = Keys.of(_normal(device, HEADS, slots), None)
    end = torch.full((1, 1, 4, 1), slots - 8, device=device)
    return torch.randn(1, HEADS, 4, 64, DIM, device=device).bfloat16(), keys, end, DIM**-0.5


def entering(device: str, slots: int) -> Sequence[Any]:
    kept = torch.arange(0, slots, 64, device=device).expand(1, HEADS, 1, -1).contiguous()
    then, end = (torch.full((1, 1, 1, 1), slots // 2 + moved, device=device) for moved in (0, 16))
    return kept, then, end, 32, 8, 16, 7


def scored(device: str, slots: int) -> Sequence[Any]:
    score = torch.randn(1, HEADS, 4, slots // 4, device=device)
    return score, torch.arange(0, 2 * slots, 8, device=device).expand_as(score), slots // 16


def overwritten(device: str, slots: int) -> Sequence[Any]:
    key, value = _normal(device, HEADS, slots), _normal(device, HEADS, slots)
    scores, order = torch.rand(2, 1, HEADS, slots, device=device).unbind(0)
    spare = torch.arange(HEADS, device=device)[None]
    return key, value, _normal(device, HEADS, 1), _normal(device, HEADS, 1), spare, order.argsort(-1), scores


def _written(run: Callable[..., Any]) -> Callable[..., Any]:
    """What is written into keys and values is compared too."""
    return lambda key, value, *rest: (*run(key, value, *rest), key, value)


SLOT_WRITE = Op("slot_write", *(replace(backend, run=_written(backend.run)) for backend in slot_write.OP.backends))


def _step(name: str) -> Op:
    """A step of HiP's selection as an operation of its own."""
    ours, theirs = hip_select.OP.backends
    return Op(f"hip_{name}", replace(ours, run=getattr(launch, name)), replace(theirs, run=getattr(reference, name)))


CHECKS: dict[str, tuple[Op, Arguments]] = {
    "ragged decode": (ragged_decode.OP, partial(decode, 1)),
    "block-sparse prompt, blocks of 64": (block_sparse_op.OP, partial(prompt, 64)),
    "block-sparse prompt, blocks of 8": (block_sparse_op.OP, partial(prompt, 8)),
    "column votes, prompt": (column_votes.OP, partial(votes, None)),
    "column votes, window": (column_votes.OP, partial(votes, 32)),
    "HiP stage, bisected": (hip_select.OP, partial(stage, 32, 64, False)),
    "HiP stage, exact": (hip_select.OP, partial(stage, 8, 256, True)),
    "slot decode": (slot_decode.OP, slots_of_a_budget),
    "gather": (compaction.OP, kept),
    "block-sparse, one query": (block_sparse_op.OP, one_query),
    "ragged decode, 8 tokens": (ragged_decode.OP, partial(decode, 8)),
    "HiP stage, one query": (hip_select.OP, partial(stage, 8, 4, True)),
    "column votes, one query": (column_votes.OP, partial(votes, 1)),
    "HiP levels": (_step("level"), levels),
    "HiP chunks that enter": (_step("enter"), entering),
    "HiP chunks that are kept": (_step("keep"), scored),
    "slot write": (SLOT_WRITE, overwritten),
}
LSE = "log-sum-exp of SDPA"
NAMES = (*CHECKS, LSE)


def cases(device: str) -> dict[str, Case]:
    """By name. On a CPU the reference in bf16 stands in for the kernel."""
    slots = 4096 if device.startswith("cuda") else 256
    ours = {name: partial(check, op, arguments, device, slots) for name, (op, arguments) in CHECKS.items()}
    return {**ours, LSE: partial(log_sum_exp, device, slots // 4)}


def log_sum_exp(device: str, slots: int) -> Iterator[dict[str, Any]]:
    """Whether what SDPA's kernels leave beside their output is the log-sum-exp that column votes take it for."""
    query, key = _normal(device, QUERY_HEADS, slots), _normal(device, HEADS, slots)
    mask = torch.ones(slots, slots, dtype=torch.bool, device=device).tril()
    repeated = key.float().repeat_interleave(QUERY_HEADS // HEADS, 1)
    logits = query.float() @ repeated.transpose(2, 3) * DIM**-0.5
    exact, wrong = logits.masked_fill_(~mask, -torch.inf).logsumexp(-1), []
    for kernel in SDPBackend.__members__.values():
        try:
            with sdpa_kernel(kernel):
                _, lse = with_lse(partial(_causal, query, key), query)
        except RuntimeError as error:
            yield {"kernel": str(kernel), "unavailable": str(error)[:100]}
            continue
        error = None if lse is None else difference(lse, exact)
        yield {"kernel": str(kernel), "error": error}
        wrong += [str(kernel)] if error is not None and error > TOLERANCE else []
    assert not wrong, f"the log-sum-exp of {wrong} is another"


def _causal(query: Tensor, key: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)


def check(op: Op, arguments: Arguments, device: str, slots: int) -> Iterator[dict[str, Any]]:
    """Raises AssertionError where kernel and reference differ."""
    torch.manual_seed(0)
    given = arguments(device, slots)
    backend = op.backends[0] if device.startswith("cuda") else op.backends[-1]
    with poisoned():
        ours = backend.run(*given)
    theirs = op.backends[-1].run(*map(precise, given))
    errors = [difference(mine, exact) for mine, exact in zip(_tensors(ours), _tensors(theirs), strict=True)]
    yield {"backend": backend.name, "errors": errors}
    assert all(error <= TOLERANCE for error in errors), f"relative RMS errors {errors}, allowed {TOLERANCE}"


@contextmanager
def poisoned() -> Iterator[None]:
    """What is not written shows: new memory is NaN."""

    def dirty(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return made

    with ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            stack.enter_context(mock.patch.object(owner, name, dirty(getattr(owner, name))))
        yield


def difference(ours: Tensor, exact: Tensor) -> float:
    """RMS of the error over RMS of the reference, where that is finite; of indices, the share that differs. NaN counts
    as infinite."""
    if not exact.is_floating_point():
        return (ours != exact).double().mean().item()
    finite = exact.isfinite()
    error = torch.where(finite, ours.double() - exact.double(), 0.0).square().mean().sqrt()
    scale = torch.where(finite, exact.double(), 0.0).square().mean().sqrt()
    found = (error / scale.clamp(min=1e-9)).item()
    return found if found == found and bool((ours.isfinite() == finite).all()) else float("inf")


def precise(value: Any) -> Any:
    """A bf16 tensor, or keys of them, in fp32; anything else as it is."""
    if isinstance(value, Keys):
        return Keys(value.rows.float(), value.origin, value.last)
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value


def _normal(device: str, heads: int, count: int) -> Tensor:
    return torch.randn(1, heads, count, DIM, dtype=torch.bfloat16, device=device)


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)
