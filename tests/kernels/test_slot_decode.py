"""Slot decode against a dense softmax in float64, and its victim against a loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_accel.kernels.slot_decode import lowest_slots
from tests.kernels.slot_case import CASES, Case

CLOSE = 2e-6


@pytest.mark.parametrize("name", CASES)
def test_equals_float64(name: str) -> None:
    case = CASES[name]
    given = case.inputs()
    output, scores, victims = case.ours()
    expected, expected_scores = case.oracle()
    assert output.dtype == case.dtype and scores.dtype == torch.float32 and victims.dtype == torch.int64
    assert (output.double() - expected).abs().max() <= (1e-14 if case.dtype == torch.float64 else CLOSE)
    assert (scores.double() - expected_scores).abs().max() <= CLOSE
    assert victims.tolist() == case.victims(scores)
    again = case.inputs()
    assert all(part is None or torch.equal(part, again[key]) for key, part in given.items())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_equals_float64_for_any_problem(data: st.DataObject) -> None:
    slots = data.draw(st.integers(1, 50))
    case = Case(
        slots=slots,
        start=tuple(data.draw(st.lists(st.integers(0, slots), min_size=2, max_size=2))),
        batch=2,
        kv_heads=data.draw(st.integers(1, 3)),
        group=data.draw(st.integers(1, 5)),
        keep_first=data.draw(st.integers(0, 5)),
        keep_recent=data.draw(st.integers(0, slots)),
        per_query=data.draw(st.booleans()),
        ties=data.draw(st.booleans()),
        decay=data.draw(st.sampled_from([1.0, 0.5])),
    )
    output, scores, victims = case.ours()
    expected, expected_scores = case.oracle()
    assert (output.double() - expected).abs().max() <= CLOSE
    assert (scores.double() - expected_scores).abs().max() <= CLOSE
    assert victims.tolist() == case.victims(scores)


def test_each_query_head_gives_away_what_it_has() -> None:
    """Attention of a step sums to the number of query heads; with learned sinks it is less."""
    scores = torch.zeros_like(CASES["plain"].inputs()["scores"])
    assert torch.allclose(CASES["plain"].ours(scores=scores)[1].sum(-1), torch.tensor(2.0))
    assert (CASES["learned_sinks"].ours(scores=scores)[1].sum(-1) < 2.0).all()


@pytest.mark.parametrize(("dtype", "close"), [(torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)])
def test_16_bits_are_added_up_in_fp32(dtype: torch.dtype, close: float) -> None:
    case = Case(dtype=dtype)
    output, scores, _ = case.ours()
    expected, expected_scores = case.oracle()
    assert output.dtype == dtype
    assert (output.double() - expected).abs().max() <= close
    assert (scores.double() - expected_scores).abs().max() <= CLOSE


def test_the_oldest_of_equals_wherever_it_stands() -> None:
    scores = torch.tensor([[[1.0, 0.5, 0.5, 0.5, 0.2, 0.1]]])
    positions = torch.tensor([[[3, 4, 2, 5, 6, 0]]])
    assert lowest_slots(scores, positions, 1, 1, False).tolist() == [[2]]
    assert lowest_slots(scores, positions, 0, 0, False).tolist() == [[5]]
    assert lowest_slots(scores, positions, 1, 0, False).tolist() == [[4]]
    # per query: 1 / 4, 0.5 / 3, 0.5 / 5, 0.5 / 2
    assert lowest_slots(scores, positions, 1, 1, True).tolist() == [[2]]
