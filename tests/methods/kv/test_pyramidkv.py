"""PyramidKV: budgets of the layers against the written rule, and SnapKV's choice within each of them."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_accel import ConfigError, PyramidKV, SnapKV
from llm_accel.methods import Depth
from tests.methods.views import Problem, choose, kept_sets, problems, row_of, view_of


def budgets(config: PyramidKV, length: int, layers: int, later: bool = False) -> list[int]:
    return [config.layer_entries(length, Depth(rank, layers, later)) for rank in range(layers)]


def test_the_published_integer_steps_overspend_and_ours_do_not() -> None:
    ours = budgets(PyramidKV(budget=128, window=8), 8000, 32)
    average, first, last = 120, 240 - 6, 6
    step = (first - last) // 31
    published = [first - step * rank + 8 for rank in range(32)]
    assert (published[0] - 8, published[1] - 8, published[-1] - 8) == (234, 227, 17)
    assert sum(published) - 32 * 8 == 4016
    assert sum(ours) - 32 * 8 == 3840 == 32 * average
    assert ours[-1] == last + 8 and first + 8 <= ours[0] <= first + 9


@pytest.mark.parametrize(
    ("length", "budget", "layers", "beta", "expected"),
    [
        (72, 24, 3, 2, [32, 24, 16]),
        (72, 24, 1, 20, [24]),
        (72, 24, 3, 1, [24, 24, 24]),
        (24, 24, 3, 20, [24, 24, 24]),  # nothing to cut
        (31, 24, 3, 20, [24, 24, 24]),  # shorter than twice the 16 beside the window: even
        (40, 24, 3, 20, [40, 24, 8]),  # the first layer keeps all there is, the last pays for it
        (72, 24, 2, 20, [40, 8]),  # 31.2 and 0.8 are rounded to 32 and 0
    ],
)
def test_worked_examples(length: int, budget: int, layers: int, beta: int, expected: list[int]) -> None:
    assert budgets(PyramidKV(budget=budget, window=8, beta=beta), length, layers) == expected


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    length=st.integers(1, 9000),
    window=st.integers(1, 64),
    extra=st.integers(1, 3000),
    layers=st.integers(1, 80),
    beta=st.integers(1, 40),
    ratio=st.none() | st.floats(0.01, 1),
)
def test_sums_are_exact_and_no_layer_keeps_more_than_one_before_it(
    length: int, window: int, extra: int, layers: int, beta: int, ratio: float | None
) -> None:
    size = {"budget": window + extra} if ratio is None else {"ratio": ratio}
    config = PyramidKV(window=window, beta=beta, **size)
    kept = budgets(config, length, layers)
    average = config.entries(length)
    assert sum(kept) == layers * average
    assert all(one >= other for one, other in pairwise(kept))
    assert all(min(window, length) <= entries <= length for entries in kept)
    if average == length or length < 2 * (average - window):
        assert kept == [average] * layers


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 500), st.integers(2, 40), st.integers(1, 30), st.integers(1, 3000))
def test_budgets_lie_within_one_of_the_line(chosen: int, layers: int, beta: int, more: int) -> None:
    window, length = 4, 4 + 2 * chosen + more
    kept = budgets(PyramidKV(budget=window + chosen, window=window, beta=beta), length, layers)
    first = min(2 * chosen - Fraction(chosen, beta), Fraction(length - window))
    last = 2 * chosen - first
    for rank, entries in enumerate(kept):
        line = first + (last - first) * Fraction(rank, layers - 1)
        assert abs(entries - window - line) <= 1


@given(st.lists(st.integers(1, 200), min_size=1, max_size=6), st.integers(0, 4))
def test_rows_are_budgeted_one_by_one(lengths: list[int], rank: int) -> None:
    config, depth = PyramidKV(budget=24, window=8), Depth(rank, 5)
    together = config.layer_entries_per_row(torch.tensor(lengths), depth)
    assert together.tolist() == [config.layer_entries(length, depth) for length in lengths]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems(protect=False), st.integers(1, 4), st.data())
def test_each_layer_keeps_what_snapkv_keeps_with_its_budget(problem: Problem, layers: int, data: st.DataObject) -> None:
    config, view = PyramidKV(budget=problem.budget, window=problem.window), view_of(problem)
    view = replace(view, depth=Depth(data.draw(st.integers(0, layers - 1)), layers))
    lengths = torch.tensor(problem.lengths)
    if not bool((config.layer_entries_per_row(lengths, view.depth) < lengths).any()):
        return
    kept = config.select(view)
    assert kept.shape[-1] == max(config.layer_entries(length, view.depth) for length in problem.lengths)
    for row, length in enumerate(problem.lengths):
        entries, alone = config.layer_entries(length, view.depth), row_of(view, row)
        first = view.slots - length
        ours = [{slot - first for slot in head} for head in kept_sets(kept)[row]]
        if entries > problem.window:
            assert ours == kept_sets(choose(SnapKV(budget=entries, window=problem.window), alone))[0]
        else:
            assert ours == [set(range(length - entries, length))] * problem.kv_heads


def test_a_later_turn_is_cut_to_the_line_of_a_long_prompt() -> None:
    config = PyramidKV(budget=24, window=8)
    assert budgets(config, 1000, 3, later=True) == budgets(config, 1000, 3)
    assert budgets(config, 30, 3, later=True) == [30, 24, 8]
    assert sum(budgets(config, 1000, 3, later=True)) == 3 * 24


def test_steepness_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="beta=0 is not allowed"):
        PyramidKV(beta=0)
