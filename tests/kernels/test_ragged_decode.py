"""Ragged attention against a dense softmax in float64, head by head."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_accel.kernels.ragged_decode import reference
from tests.kernels.ragged_case import CASES, Case

CLOSE = 2e-6


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_float64(case: Case) -> None:
    assert (case.ours().double() - case.oracle()).abs().max() <= CLOSE


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_equals_float64_for_any_raggedness(data: st.DataObject) -> None:
    heads, count = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    rows = st.lists(st.integers(count, 40), min_size=heads, max_size=heads)
    lengths = data.draw(st.lists(rows, min_size=1, max_size=3))
    case = Case(lengths, count=count, page=data.draw(st.integers(1, 9)), seed=data.draw(st.integers(0, 99)))
    assert (case.ours().double() - case.oracle()).abs().max() <= CLOSE


@pytest.mark.parametrize("name", ["ragged", "continuation_softcap_sinks"])
def test_blocks_of_the_pool_do_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = CASES[name].ours()
    monkeypatch.setattr(reference, "POOL_BLOCK", 8)
    assert torch.equal(CASES[name].ours(), whole)


def test_float64_stays_float64() -> None:
    case = Case([[5, 17]], dtype=torch.float64)
    assert case.ours().dtype == torch.float64
    assert (case.ours() - case.oracle()).abs().max() <= 1e-14


@pytest.mark.parametrize(("dtype", "close"), [(torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)])
def test_16_bit_pools_are_added_up_in_fp32(dtype: torch.dtype, close: float) -> None:
    case = Case([[50, 17]], dtype=dtype)
    assert case.ours().dtype == dtype
    assert (case.ours().double() - case.oracle()).abs().max() <= close


def test_a_sink_that_outweighs_everything_leaves_nothing() -> None:
    case = Case([[6, 9]], with_sinks=True)
    assert case.sinks is not None
    case.sinks.fill_(1e4)
    assert case.ours().abs().max() == 0


def test_large_logits_do_not_overflow() -> None:
    case = Case([[6, 19]])
    case.query *= 1e4
    assert torch.isfinite(case.ours()).all()
    assert (case.ours().double() - case.oracle()).abs().max() <= 1e-4
