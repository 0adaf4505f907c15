"""Random entries: seeded, uniform, independent of the batch around a row."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_accel import RandomKV
from llm_accel.methods.selection import uniform
from tests.methods.views import Problem, check_laws, choose, kept_sets, problems, row_of, view_of

LONG = Problem((400,), kv_heads=4, group=1, window=8, budget=108, protect=False, seed=0)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(problems(), st.integers(0, 10**6))
def test_laws(problem: Problem, seed: int) -> None:
    check_laws(RandomKV(budget=problem.budget, window=problem.window, seed=seed), view_of(problem), problem.window)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problems(), st.integers(0, 10**6))
def test_rows_are_independent(problem: Problem, seed: int) -> None:
    config, view = RandomKV(budget=problem.budget, window=problem.window, seed=seed), view_of(problem)
    for row, heads in enumerate(kept_sets(choose(config, view))):
        first = view.slots - problem.lengths[row]
        alone = kept_sets(choose(config, row_of(view, row)))[0]
        assert [{slot - first for slot in head} for head in heads] == alone


def test_the_choice_depends_on_seed_layer_and_head_and_on_nothing_else() -> None:
    config, view = RandomKV(budget=108, window=8), view_of(LONG)
    kept = choose(config, view)
    other_content = replace(view, key=torch.zeros_like(view.key), query=view.query * 3)
    assert torch.equal(choose(config, other_content), kept)
    assert not torch.equal(choose(config, replace(view, layer=2)), kept)
    assert not torch.equal(RandomKV(budget=108, window=8, seed=1).select(view), kept)
    assert len({tuple(head) for head in kept[0].tolist()}) == 4


def test_a_window_of_nothing() -> None:
    kept = RandomKV(budget=50, window=0).select(view_of(LONG))
    assert not (kept == 399).any(-1).all()


def test_every_entry_is_as_likely_as_any_other() -> None:
    view, rounds = view_of(LONG), 250
    counts = torch.zeros(392)
    for seed in range(rounds):
        kept = RandomKV(budget=108, window=8, seed=seed).select(view)
        counts += torch.bincount(kept[..., :-8].flatten(), minlength=392).float()
    draws = rounds * LONG.kv_heads
    expected, spread = draws * 100 / 392, (draws * 100 / 392 * (1 - 100 / 392)) ** 0.5
    assert counts.mean() == expected
    assert (counts - expected).abs().max() < 5 * spread
    assert 0.8 * spread < counts.std() < 1.2 * spread


def test_the_hash_is_uniform_and_its_streams_are_unrelated() -> None:
    position = torch.arange(20_000)
    streams = torch.stack([uniform(position, torch.tensor(stream)) for stream in (0, 1, 2, 1031, 4099 * 1031)])
    assert streams.min() >= 0
    assert streams.max() < 1
    for stream in streams:
        histogram = torch.histc(stream, bins=50, min=0, max=1)
        chi_square = ((histogram - 400) ** 2 / 400).sum()
        assert chi_square < 100  # 49 degrees of freedom: beyond 100 by chance once in 20,000
        assert torch.corrcoef(torch.stack([stream[1:], stream[:-1]]))[0, 1].abs() < 0.03
    related = torch.corrcoef(streams) - torch.eye(len(streams))
    assert related.abs().max() < 0.03
