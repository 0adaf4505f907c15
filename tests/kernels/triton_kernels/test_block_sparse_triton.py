"""The Triton kernel of block-sparse attention against float64, on the cases of the reference and some of its own."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_accel.kernels import splits
from llm_accel.kernels.block_list import BlockList
from llm_accel.kernels.block_sparse.launch import block_sparse_attention_triton, plan
from tests.kernels.block_sparse_cases import CASES, Case
from tests.kernels.triton_device import DEVICE, assert_close


def on_device(thing: Any) -> Any:
    return thing.to(DEVICE) if isinstance(thing, Tensor) else thing


def triton(case: Case) -> tuple[Tensor, Tensor]:
    moved = {field.name: on_device(getattr(case.blocks, field.name)) for field in fields(BlockList)}
    tensors = [on_device(part) for part in (case.query, case.key, case.value)]
    rest = on_device(case.first), 0.3, case.softcap, on_device(case.sinks)
    output, lse = block_sparse_attention_triton(*tensors, BlockList(**moved), *rest)
    return output.cpu(), lse.cpu()


def check(case: Case) -> None:
    output, lse = triton(case)
    expected, expected_lse = case.oracle()
    assert output.dtype == case.dtype
    # the interpreter cuts bf16 off instead of rounding it
    assert_close("output", output, expected, case.dtype, slack=2.0 if case.dtype == torch.bfloat16 else 1.0)
    assert torch.equal(lse.isinf(), expected_lse.isinf())
    assert_close("lse", lse.nan_to_num(neginf=0.0), expected_lse.nan_to_num(neginf=0.0), case.dtype)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_cases_of_the_reference(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_head_dims(dim: int, dtype: torch.dtype) -> None:
    check(Case(queries=50, slots=110, dim=dim, width=dim, dtype=dtype, kv_heads=1, group=2, start=[0, 31]))


@pytest.mark.parametrize("group", [1, 4, 6, 7, 16])
def test_groups(group: int) -> None:
    check(Case(queries=40, slots=90, group=group, kv_heads=1, start=[11]))


@pytest.mark.parametrize("block_k", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("kind", ["selected", "dense_mask"])
def test_block_sizes(block_k: int, kind: str) -> None:
    check(Case(queries=60, slots=500, block_k=block_k, sink=128, window=9, kind=kind, kv_heads=1, start=[13]))


def test_views_of_a_fused_projection() -> None:
    case = Case()
    expected, _ = triton(case)
    for name in ("query", "key", "value"):
        part = getattr(case, name)
        setattr(case, name, torch.cat([part, part], -1).transpose(1, 2).contiguous().transpose(1, 2)[..., : case.dim])
    assert torch.equal(triton(case)[0], expected)


def test_order_of_listed_blocks_does_not_matter() -> None:
    case = Case(budget=5)
    blocks = case.blocks
    width = int(blocks.ptr.flatten()[1])
    rows = blocks.idx.view(-1, width).clone()
    for row, listed in zip(rows, blocks.n_listed.flatten().tolist(), strict=True):
        row[:listed] = row[:listed].flip(0)
    expected, _ = triton(case)
    case.blocks = replace(blocks, idx=rows.flatten())
    assert_close("output", triton(case)[0], expected.double(), torch.float32)


ONE_BLOCK = {
    "one_query": Case(queries=1, slots=143),
    "padded": Case(queries=8, slots=143, start=[0, 50, 138, 143]),
    "list_per_query_head": Case(queries=3, slots=143, lists="query"),
    "one_list": Case(queries=1, slots=143, lists="one", group=3),
    "learned_sinks": Case(queries=8, slots=143, with_sinks=True, start=[3, 143]),
    "streaming": Case(kind="sink_window", sink=5, window=40, queries=8, slots=143, start=[0, 139]),
    "softcap": Case(kind="dense", queries=5, slots=300, softcap=2.0),
    "fewer_tiles_than_splits": Case(queries=1, slots=500, budget=0, sink=0, window=9),
    "fp16": Case(queries=1, slots=300, dim=64, width=64, dtype=torch.float16, group=4, budget=9),
    "bf16": Case(queries=8, slots=300, dim=128, width=128, dtype=torch.bfloat16, group=7, kv_heads=1, start=[5]),
}


@pytest.mark.parametrize("name", ONE_BLOCK)
def test_keys_of_a_single_query_block_are_shared_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "LEAST_SHARE", 8)
    case = ONE_BLOCK[name]
    rest = (None, 0.3, None, None, *vars(case.blocks).values())
    (_, steps) = plan(case.query, case.key, case.value, *rest)
    assert [step.kernel.__name__ for step in steps] == ["block_sparse_kernel", "combine_kernel"]
    assert steps[0].grid[2] > 1
    check(case)
