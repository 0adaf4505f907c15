"""SnapKV: its worked example, its laws, and its choice against a plain-python oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llm_accel import SnapKV
from llm_accel.methods import PromptView
from llm_accel.methods.kv.snapkv import pooled_votes
from tests.methods.views import Problem, check_laws, choose, kept_sets, problems, row_of, view_of, view_with_votes

VOTES = [0.30, 0.02, 0.05, 0.01, 0.20, 0.02, 0.01, 0.09]
Pool = Literal["max", "avg"]


@pytest.mark.parametrize(
    ("budget", "options", "expected"),
    [
        (6, {"kernel": 1}, {0, 2, 4, 7}),
        (6, {"kernel": 3}, {0, 1, 4, 5}),
        (5, {"kernel": 3}, {0, 1, 4}),
        (5, {"kernel": 3, "tie": "index"}, {0, 1, 3}),
        (6, {"kernel": 3, "pool": "avg"}, {0, 1, 3, 4}),
        (9, {"kernel": 3}, {0, 1, 3, 4, 5, 6, 7}),
        (10, {"kernel": 3}, set(range(8))),
    ],
)
def test_worked_example(budget: int, options: dict[str, object], expected: set[int]) -> None:
    view = view_with_votes(VOTES, window=2)
    config = SnapKV(budget=budget, window=2, **options)
    assert torch.allclose(config.votes(view)[1][0, 0], torch.tensor(VOTES), atol=1e-6)
    assert kept_sets(choose(config, view)) == [[expected | {8, 9}]]


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        ("max", [0.30, 0.30, 0.05, 0.20, 0.20, 0.20, 0.09, 0.09]),
        # the ends average over the two entries that exist, not over a zero beside them
        ("avg", [0.16, 0.37 / 3, 0.08 / 3, 0.26 / 3, 0.23 / 3, 0.23 / 3, 0.04, 0.05]),
    ],
)
def test_pooled_worked_example(pool: Pool, expected: list[float]) -> None:
    pooled = SnapKV(budget=6, window=2, kernel=3, pool=pool).votes(view_with_votes(VOTES, window=2))[0]
    assert torch.allclose(pooled[0, 0], torch.tensor(expected), atol=1e-6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from([1, 3, 5, 7, 13]), st.sampled_from(["max", "avg"]), st.integers(1, 20), st.integers(0, 19))
def test_pooling_against_a_loop(kernel: int, pool: Pool, length: int, padding: int) -> None:
    padding = min(padding, length - 1)
    votes = torch.rand(1, 2, length, generator=torch.Generator().manual_seed(length))
    inside = (torch.arange(length) >= padding)[None, None]
    votes = votes * inside
    pooled = pooled_votes(votes, inside, kernel, pool)
    for head in range(2):
        for slot in range(padding, length):
            near = votes[0, head, max(padding, slot - kernel // 2) : slot + kernel // 2 + 1]
            expected = near.max() if pool == "max" else near.mean()
            assert torch.isclose(pooled[0, head, slot], expected, atol=1e-6)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(problems(), st.sampled_from([1, 3, 7]), st.sampled_from(["max", "avg"]), st.sampled_from(["mean", "max"]))
def test_laws(problem: Problem, kernel: int, pool: Pool, gqa: Literal["mean", "max"]) -> None:
    config = SnapKV(budget=problem.budget, window=problem.window, kernel=kernel, pool=pool, gqa=gqa)
    check_laws(config, view_of(problem), problem.window)


def oracle(config: SnapKV, view: PromptView) -> list[list[set[int]]]:
    """The documented choice for one unpadded row: protected first, then pooled vote, raw vote, lower index."""
    length, window = view.slots, config.window
    count = config.entries(length)
    pooled, raw = (votes[0].tolist() for votes in config.votes(view))
    protected = [False] * length if view.protected is None else view.protected[0].tolist()
    heads = []
    for head in range(view.kv_heads):
        old = range(max(0, length - window))

        def order(slot: int, head: int = head) -> tuple[object, ...]:
            if protected[slot]:
                return (False, 0.0, 0.0, slot)
            return (True, -pooled[head][slot], -raw[head][slot] if config.tie == "raw" else 0.0, slot)

        best = sorted(old, key=order)[: count - min(window, length)]
        heads.append(set(best) | set(range(max(0, length - window), length)))
    return [heads]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(problems(), st.sampled_from([1, 3, 7]), st.sampled_from(["raw", "index"]))
def test_the_choice_and_its_ties_against_an_oracle(problem: Problem, kernel: int, tie: Literal["raw", "index"]) -> None:
    config = SnapKV(budget=problem.budget, window=problem.window, kernel=kernel, tie=tie)
    view = row_of(view_of(problem), 0)
    assume(config.entries(view.slots) < view.slots)
    assert kept_sets(choose(config, view)) == oracle(config, view)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems(), st.sampled_from(["max", "avg"]), st.sampled_from([None, 0.2, 0.6]))
def test_rows_are_independent(problem: Problem, pool: Pool, ratio: float | None) -> None:
    size = {"budget": problem.budget} if ratio is None else {"ratio": ratio}
    config = SnapKV(window=problem.window, pool=pool, **size)
    # protected entries beside a small ratio may be more than fit, which the patches refuse
    view = view_of(replace(problem, protect=problem.protect and ratio is None))
    for row, heads in enumerate(kept_sets(choose(config, view))):
        first = view.slots - problem.lengths[row]
        alone = kept_sets(choose(config, row_of(view, row)))[0]
        assert [{slot - first for slot in head} for head in heads] == alone


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problems(), st.sampled_from(["mean", "max"]))
def test_permuted_heads_give_permuted_choices(problem: Problem, gqa: Literal["mean", "max"]) -> None:
    config, view = SnapKV(budget=problem.budget, window=problem.window, gqa=gqa), view_of(problem)
    order = torch.randperm(problem.kv_heads, generator=torch.Generator().manual_seed(problem.seed))
    groups = view.query.unflatten(1, (problem.kv_heads, problem.group))
    shuffled = replace(view, query=groups[:, order].flatten(1, 2), key=view.key[:, order])
    assert torch.equal(choose(config, shuffled), choose(config, view)[:, order])


@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("needle", [3, 20, 47])
def test_a_planted_needle_is_kept_with_its_neighbours(group: int, needle: int) -> None:
    view = view_of(Problem((64,), kv_heads=2, group=group, window=8, budget=24, protect=False, seed=3))
    view.key[:, :, needle] = 50 * view.query.unflatten(1, (2, group)).mean((2, 3))
    for head in kept_sets(SnapKV(budget=16, window=8, kernel=7).select(view))[0]:
        assert set(range(needle - 3, needle + 4)) <= head


def test_equal_votes_keep_the_older_entries() -> None:
    view = view_of(Problem((40, 40), kv_heads=2, group=2, window=4, budget=12, protect=False, seed=0))
    flat = replace(view, key=torch.zeros_like(view.key))
    expected = {*range(8), 36, 37, 38, 39}
    assert kept_sets(SnapKV(budget=12, window=4).select(flat)) == [[expected, expected]] * 2


def test_one_entry_too_many_evicts_one() -> None:
    view = view_of(Problem((40,), kv_heads=3, group=2, window=8, budget=39, protect=False, seed=5))
    config = SnapKV(budget=39, window=8, kernel=1)
    weakest = config.votes(view)[1].argmin(-1)
    for head, kept in enumerate(kept_sets(choose(config, view))[0]):
        assert set(range(40)) - kept == {int(weakest[0, head])}


def test_fewer_queries_than_the_window_still_keep_the_window() -> None:
    view = view_of(Problem((40,), kv_heads=2, group=2, window=8, budget=20, protect=False, seed=5))
    check_laws(SnapKV(budget=20, window=8), replace(view, query=view.query[:, :, -3:]), always=8)


def test_shared_latent_heads_share_one_choice() -> None:
    view = view_of(Problem((40,), kv_heads=4, group=1, window=8, budget=20, protect=False, seed=5))
    kept = check_laws(SnapKV(budget=20, window=8), replace(view, kv_heads=1), always=8)
    assert kept.shape[1] == 1
