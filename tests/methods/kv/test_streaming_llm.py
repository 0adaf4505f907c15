"""StreamingLLM: the exact sets it keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_accel import StreamingLLM
from tests.methods.views import Problem, check_laws, choose, kept_sets, problems, row_of, view_of


@settings(max_examples=80, deadline=None, derandomize=True)
@given(problems(), st.integers(0, 6))
def test_laws(problem: Problem, sinks: int) -> None:
    view = view_of(problem)
    kept = check_laws(StreamingLLM(budget=problem.budget + sinks, sinks=sinks), view, always=1)
    assert torch.equal(kept, kept[:, :1].expand_as(kept))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(problems(protect=False), st.integers(0, 6))
def test_keeps_exactly_sinks_and_recent_entries(problem: Problem, sinks: int) -> None:
    config, view = StreamingLLM(budget=problem.budget + sinks, sinks=sinks), view_of(problem)
    for row, heads in enumerate(kept_sets(choose(config, view))):
        length = problem.lengths[row]
        first, recent = view.slots - length, config.entries(length) - min(sinks, config.entries(length))
        expected = set(range(first, first + min(sinks, length))) | set(range(view.slots - recent, view.slots))
        assert all(head == expected for head in heads)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problems(), st.sampled_from([None, 0.1, 0.5, 1.0]))
def test_rows_are_independent(problem: Problem, ratio: float | None) -> None:
    config = StreamingLLM(budget=problem.budget + 4) if ratio is None else StreamingLLM(ratio=ratio)
    # protected entries beside a small ratio may be more than fit, which the patches refuse
    view = view_of(replace(problem, protect=problem.protect and ratio is None))
    for row, heads in enumerate(kept_sets(choose(config, view))):
        first = view.slots - problem.lengths[row]
        alone = kept_sets(choose(config, row_of(view, row)))[0]
        assert [{slot - first for slot in head} for head in heads] == alone


@pytest.mark.parametrize(
    ("budget", "protected", "expected"),
    [
        (6, [], {0, 1, 2, 3, 10, 11}),
        (7, [6], {0, 1, 2, 3, 6, 10, 11}),
        (7, [5, 7], {0, 1, 2, 3, 5, 7, 11}),
        (12, [], set(range(12))),
        (50, [], set(range(12))),
    ],
)
def test_worked_sets(budget: int, protected: list[int], expected: set[int]) -> None:
    view = view_of(Problem((12,), kv_heads=2, group=2, window=2, budget=6, protect=False, seed=0))
    mask = torch.zeros(1, 12, dtype=torch.bool)
    mask[0, protected] = True
    assert kept_sets(StreamingLLM(budget=budget).select(replace(view, protected=mask))) == [[expected, expected]]


def test_a_long_prompt_keeps_its_order() -> None:
    view = view_of(Problem((5000,), kv_heads=1, group=1, window=1, budget=6, protect=False, seed=0), dim=1)
    kept = StreamingLLM(budget=100).select(view)[0, 0].tolist()
    assert kept == [0, 1, 2, 3, *range(5000 - 96, 5000)]
