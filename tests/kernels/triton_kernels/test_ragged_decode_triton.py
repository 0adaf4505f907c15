"""Ragged attention on Triton against the float64 oracle of the reference's own test."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from llm_accel.kernels import splits
from llm_accel.kernels.dispatch import Problem
from llm_accel.kernels.ragged_decode import OP, launch, ragged_attention
from tests.kernels.ragged_case import CASES, Case
from tests.kernels.triton_device import DEVICE, assert_close

WIDE = {
    "splits_of_long_heads": Case([[300, 17], [5, 130]], group=4, dim=64, width=64, page=16),
    "group_of_seven": Case([[70, 9]], group=7, dim=64, width=64, page=64),
    "pages_of_a_chosen_block": Case([[100, 33], [57, 8]], group=4, dim=64, width=64, page=8),
    "group_of_sixteen": Case([[70]], group=16, count=2, dim=64, width=64),
    "eight_tokens": Case([[70, 41]], group=3, count=8, dim=64, width=64, softcap=5.0, with_sinks=True),
    "dim_80": Case([[40, 33]], dim=80, width=80),
    "dim_96_value_48": Case([[40, 33]], dim=96, width=48),
    "dim_128": Case([[40, 33]], dim=128, width=128),
    "dim_256": Case([[40, 33]], dim=256, width=256),
    "fp16": Case([[130, 33]], dim=64, width=64, dtype=torch.float16, with_sinks=True),
    "bf16": Case([[130, 33]], dim=128, width=128, dtype=torch.bfloat16, softcap=20.0),
}
NARROW = {name: case for name, case in CASES.items() if name != "continuation_of_several_blocks"}


def ours(case: Case) -> Tensor:
    return ragged_attention(
        case.query.to(DEVICE),
        case.keys.to(DEVICE),
        case.values.to(DEVICE),
        case.table.to(DEVICE),
        torch.tensor(case.lengths, device=DEVICE),
        scaling=0.4,
        softcap=case.softcap,
        sinks=None if case.sinks is None else case.sinks.to(DEVICE),
    )


@pytest.mark.parametrize("name", NARROW | WIDE)
def test_equals_float64(name: str) -> None:
    case = (NARROW | WIDE)[name]
    result = ours(case)
    assert result.dtype == case.dtype
    # the interpreter cuts bf16 results off instead of rounding them
    assert_close(name, result, case.oracle(), case.dtype, slack=2.0 if case.dtype == torch.bfloat16 else 1.0)


@pytest.mark.parametrize("name", ["ragged", "eight_tokens", "learned_sinks", "splits_of_long_heads"])
def test_splits_do_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "LEAST_SHARE", 8)
    case = (NARROW | WIDE)[name]
    lengths = torch.tensor(case.lengths)
    steps = launch.plan(case.query, case.keys, case.values, case.table, lengths, 0.4, None, None)[1]
    assert steps[0].grid[1] > 1
    assert_close(name, ours(case), case.oracle(), case.dtype)


def test_a_head_without_entries_gives_zero() -> None:
    case = dataclasses.replace(CASES["ragged"], lengths=[[5, 17], [9, 4]])
    lengths = torch.tensor([[0, 17], [9, 0]], device=DEVICE)
    args = (case.query.to(DEVICE), case.keys.to(DEVICE), case.values.to(DEVICE), case.table.to(DEVICE), lengths)
    result = ragged_attention(*args, scaling=0.4)
    assert torch.isfinite(result).all()
    assert (result[0, :, : case.group] == 0).all() and (result[1, :, case.group :] == 0).all()
    assert (result[0, :, case.group :] != 0).any()


def test_triton_is_what_runs_here() -> None:
    assert OP.explain(Problem(torch.device(DEVICE), torch.float16, 64, 4))[0] == "triton"
