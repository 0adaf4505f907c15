"""AdaKV: shares of the heads against plain-python oracles of both rules, exact totals, and SnapKV as its limit."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llm_accel import AdaKV, ConfigError, PyramidKV, SnapKV
from llm_accel.methods import Depth, PromptView
from llm_accel.methods.kv.adakv import blended
from tests.methods.views import Problem, kept_sets, problems, row_of, view_of

Rule = Literal["floor", "blend"]
ALPHAS = st.sampled_from([0.0, 0.1, 0.2, 1 / 3, 0.5, 0.9, 1.0])
RULES = st.sampled_from(["floor", "blend"])
WON = [0, 0, 151, 268, 331, 349, 350, 343]


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0, WON),
        (200_000, [45, 45, 166, 259, 309, 324, 325, 319]),
        (500_000, [112, 112, 188, 246, 278, 286, 287, 283]),
        (1_000_000, [224] * 8),
    ],
)
def test_blend_worked_example(share: int, expected: list[int]) -> None:
    mixed = blended(torch.tensor([WON]), share)[0]
    assert mixed.tolist() == expected
    assert int(mixed.sum()) == 8 * 224 == 1792


@given(st.lists(st.integers(0, 4000), min_size=1, max_size=16), st.integers(0, 10**6))
def test_blend_keeps_the_sum_and_rounds_by_less_than_one(won: list[int], share: int) -> None:
    mixed = blended(torch.tensor([won]), share)[0].tolist()
    assert sum(mixed) == sum(won)
    for one, before in zip(mixed, won, strict=True):
        exact = (before * (10**6 - share) + share * sum(won) / len(won)) / 10**6
        assert abs(one - exact) < 1 + 1e-6


def asked(config: AdaKV, view: PromptView) -> bool:
    """Whether the patches would ask the method at all."""
    lengths = view.slots - (torch.zeros(1, dtype=torch.long) if view.start is None else view.start)
    return bool((config.layer_entries_per_row(lengths, view.depth) < lengths).any())


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problems(), ALPHAS, RULES, st.booleans(), st.sampled_from([1, 5]))
def test_laws(problem: Problem, alpha: float, rule: Rule, normalize: bool, kernel: int) -> None:
    sizes = {"budget": problem.budget, "window": problem.window, "kernel": kernel}
    config, view = AdaKV(alpha=alpha, rule=rule, normalize=normalize, **sizes), view_of(problem)
    assume(asked(config, view))
    kept = config.select(view)
    assert kept.dtype == torch.int64 and kept.shape[:2] == (len(problem.lengths), problem.kv_heads)
    assert kept.shape[2] == (kept >= 0).sum(-1).max()
    assert torch.equal(kept, kept.sort(-1).values)
    assert torch.equal(config.select(view), kept)
    for row, (length, heads) in enumerate(zip(problem.lengths, kept_sets(kept), strict=True)):
        first, entries = view.slots - length, config.entries(length)
        sure = math.floor(round(alpha * 10**6) * max(0, entries - problem.window) / 10**6)
        always = set(range(max(first, view.slots - problem.window), view.slots))
        if view.protected is not None:
            always |= set(view.protected[row].nonzero()[:, 0].tolist())
        assert sum(map(len, heads)) == problem.kv_heads * entries
        for head in heads:
            assert head >= always and min(head) >= first
            assert len(head) >= min(length, problem.window) + sure


@settings(max_examples=80, deadline=None, derandomize=True)
@given(problems(), RULES, st.booleans())
def test_alpha_1_is_snapkv(problem: Problem, rule: Rule, normalize: bool) -> None:
    sizes, view = {"budget": problem.budget, "window": problem.window}, view_of(problem)
    config = AdaKV(alpha=1.0, rule=rule, normalize=normalize, **sizes)
    assume(asked(config, view))
    assert torch.equal(config.select(view), SnapKV(**sizes).select(view))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems(), ALPHAS, RULES)
def test_equal_heads_share_evenly(problem: Problem, alpha: float, rule: Rule) -> None:
    view = view_of(problem)
    same = replace(
        view,
        query=view.query[:, : problem.group].repeat(1, problem.kv_heads, 1, 1),
        key=view.key[:, :1].repeat(1, problem.kv_heads, 1, 1),
    )
    sizes = {"budget": problem.budget, "window": problem.window}
    config = AdaKV(alpha=alpha, rule=rule, **sizes)
    assume(asked(config, same))
    assert torch.equal(config.select(same), SnapKV(**sizes).select(same))


def oracle(config: AdaKV, view: PromptView) -> list[set[int]]:
    """Both rules for one unpadded row with loops and sorts."""
    length, window, entries = view.slots, config.window, config.entries(view.slots)
    pooled, raw = (votes[0].tolist() for votes in config.score_method.votes(view))
    heads, old = range(view.kv_heads), range(length - window)
    chosen = entries - window
    own = {head: sorted(old, key=lambda slot, h=head: (-pooled[h][slot], -raw[h][slot], slot)) for head in heads}
    everything = sorted(
        ((head, slot) for head in heads for slot in old),
        key=lambda item: (-pooled[item[0]][item[1]], -raw[item[0]][item[1]], item[1], item[0]),
    )
    total = view.kv_heads * chosen
    if config.rule == "floor":
        sure = math.floor(config.alpha * chosen + 1e-9)
        taken = {(head, slot) for head in heads for slot in own[head][: max(sure, config.alpha > 0)]}
        rest = [item for item in everything if item not in taken]
        taken |= set(rest[: total - len(taken)])
    else:
        won = [sum(head == one for one, _ in everything[:total]) for head in heads]
        counts = blended(torch.tensor([won]), round(config.alpha * 10**6))[0].tolist()
        taken = {(head, slot) for head in heads for slot in own[head][: counts[head]]}
    recent = set(range(length - window, length))
    return [{slot for one, slot in taken if one == head} | recent for head in heads]


@settings(max_examples=120, deadline=None, derandomize=True)
@given(problems(protect=False), st.sampled_from([0.0, 0.2, 0.5, 1.0]), RULES)
def test_the_choice_against_an_oracle(problem: Problem, alpha: float, rule: Rule) -> None:
    config = AdaKV(budget=problem.budget, window=problem.window, alpha=alpha, rule=rule)
    view = row_of(view_of(problem), 0)
    assume(asked(config, view))
    assert kept_sets(config.select(view))[0] == oracle(config, view)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems(), RULES, st.booleans())
def test_rows_are_independent(problem: Problem, rule: Rule, normalize: bool) -> None:
    config = AdaKV(budget=problem.budget, window=problem.window, rule=rule, normalize=normalize)
    view = view_of(problem)
    assume(asked(config, view))
    for row, heads in enumerate(kept_sets(config.select(view))):
        first, alone = view.slots - problem.lengths[row], row_of(view, row)
        expected = kept_sets(config.select(alone))[0] if asked(config, alone) else [set(range(alone.slots))]
        for head, other in zip(heads, expected * (problem.kv_heads if len(expected) == 1 else 1), strict=True):
            assert {slot - first for slot in head} == other


def two_heads(loud: float) -> PromptView:
    """Two heads over 16 entries; the window of 2 looks at the old entries ``loud`` times more in the second one."""
    query = torch.ones(1, 2, 2, 1)
    key = torch.zeros(1, 2, 16, 1)
    key[0, :, :14, 0] = torch.linspace(1.0, 0.0, 14)
    key[0, 0, :14] -= loud
    return PromptView(query, key, kv_heads=2, start=None, scaling=1.0, softcap=None, sinks=None, layer=0, layers=1)


def test_normalize_compares_shares_of_a_head() -> None:
    view = two_heads(loud=3.0)
    plain = AdaKV(budget=8, window=2, kernel=1).select(view)
    shares = AdaKV(budget=8, window=2, kernel=1, normalize=True).select(view)
    assert (plain >= 0).sum(-1).tolist() == [[2 + 1, 16 - 3]]  # the loud head takes all but what is sure
    assert (shares >= 0).sum(-1).tolist() == [[8, 8]]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems(protect=False), st.integers(0, 3))
def test_layers_split_as_in_pyramidkv(problem: Problem, rank: int) -> None:
    sizes, depth = {"budget": problem.budget, "window": problem.window, "beta": 5}, Depth(rank, 4)
    config, view = AdaKV(base="pyramidkv", **sizes), replace(view_of(problem), depth=depth)
    assume(asked(config, view))
    for length, heads in zip(problem.lengths, kept_sets(config.select(view)), strict=True):
        assert sum(map(len, heads)) == problem.kv_heads * PyramidKV(**sizes).layer_entries(length, depth)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 99), RULES, ALPHAS)
def test_heads_that_hold_different_numbers_compete_again(seed: int, rule: Rule, alpha: float) -> None:
    view = view_of(Problem((40, 40), kv_heads=3, group=2, window=4, budget=12, protect=False, seed=seed))
    starts = torch.randint(0, 30, (2, 3), generator=torch.Generator().manual_seed(seed))
    ragged = replace(view, start=starts, depth=Depth(later=True))
    config = AdaKV(budget=12, window=4, rule=rule, alpha=alpha)
    votes = config.score_method.votes(ragged)[1]
    for row in range(2):
        for head in range(3):
            alone = replace(
                view,
                query=view.query[row : row + 1, 2 * head : 2 * head + 2],
                key=view.key[row : row + 1, head : head + 1, starts[row, head] :],
                kv_heads=1,
            )
            assert torch.allclose(
                votes[row, head, starts[row, head] :], config.score_method.votes(alone)[1][0, 0], atol=1e-6
            )
    kept = config.select(ragged)
    for row, heads in enumerate(kept_sets(kept)):
        assert sum(map(len, heads)) == min(36, int((40 - starts[row]).sum()))
        for head, slots in enumerate(heads):
            assert slots >= set(range(36, 40)) and min(slots) >= starts[row, head]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"alpha": 1.5}, r"alpha=1.5 is not allowed; give a number in \[0, 1\]"),
        ({"alpha": -0.1}, "alpha"),
        ({"rule": "max"}, "'floor' or 'blend'"),
        ({"page": 0}, "page=0"),
        ({"beta": 5}, "together with base='pyramidkv'"),
        ({"beta": 0, "base": "pyramidkv"}, "at least 1"),
    ],
    ids=str,
)
def test_values_that_cannot_work(options: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        AdaKV(**options)
