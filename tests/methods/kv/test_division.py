"""Divisions of a budget over layers and heads go with every score, and say what they cannot go with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_accel import AdaKV, ConfigError, PyramidKV, RandomKV, SnapKV, register_method
from llm_accel.methods import Depth, PromptCompression, PromptView, catalog
from llm_accel.registry import configure, parse
from tests.methods.views import Problem, kept_sets, problems, view_of
from tests.pages import tutorial_method

KeyNorm = tutorial_method()


@dataclass(frozen=True)
class HalfNewest(KeyNorm):  # type: ignore[misc, valid-type]
    """Overrides what a division divides."""

    name: ClassVar[str] = "half_newest"

    def select(self, view: PromptView) -> Tensor:
        raise NotImplementedError


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Iterator[None]:
    before = dict(catalog._registered)
    register_method(KeyNorm)
    register_method(HalfNewest)
    yield
    catalog._registered.clear()
    catalog._registered.update(before)


def bases(window: int) -> list[tuple[str, dict[str, int], PromptCompression]]:
    """Text of a base, the options that go to the division itself, and the base alone with a large budget."""
    return [
        ("snapkv", {"window": window}, SnapKV(budget=1000, window=window)),
        (f"random:seed=3:window={window}", {}, RandomKV(budget=1000, seed=3, window=window)),
        ("key_norm", {}, KeyNorm(budget=1000)),
    ]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems(), st.integers(0, 2), st.sampled_from(["floor", "blend"]))
def test_divisions_that_leave_nothing_to_divide_are_the_base(problem: Problem, place: int, rule: Any) -> None:
    text, more, base = bases(problem.window)[place]
    view, alone = view_of(problem), replace(base, budget=problem.budget)
    assume(max(problem.lengths) > problem.budget)
    expected = alone.select(view)
    assert torch.equal(AdaKV(budget=problem.budget, base=text, alpha=1.0, rule=rule, **more).select(view), expected)
    assert torch.equal(PyramidKV(budget=problem.budget, base=text, beta=1, **more).select(view), expected)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems(protect=False), st.integers(0, 2), st.integers(0, 3))
def test_layers_keep_what_the_base_keeps_with_their_budget(problem: Problem, place: int, rank: int) -> None:
    text, more, base = bases(problem.window)[place]
    config = PyramidKV(budget=problem.budget, base=text, beta=5, **more)
    view = replace(view_of(replace(problem, lengths=problem.lengths[:1])), depth=Depth(rank, 4))
    entries = config.layer_entries(view.slots, view.depth)
    assume(config.reserved < entries < view.slots)
    assert torch.equal(config.select(view), replace(base, budget=entries).select(view))
    both = AdaKV(budget=problem.budget, base="pyramidkv" if text == "snapkv" else f"pyramidkv:base={text}", **more)
    assert both.layer_entries(view.slots, view.depth) == PyramidKV(
        budget=problem.budget, base=text, **more
    ).layer_entries(view.slots, view.depth)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problems(protect=False))
def test_heads_compete_with_any_score(problem: Problem) -> None:
    """Without a sure share the best entries of all heads stay, here the smallest norms."""
    view = view_of(replace(problem, lengths=problem.lengths[:1]))
    assume(view.slots > problem.budget)
    kept = kept_sets(AdaKV(budget=problem.budget, base="key_norm", alpha=0.0).select(view))[0]
    norms = view.key.norm(dim=-1)[0]
    heads, slots = norms.shape
    places = sorted((float(norms[head, slot]), slot, head) for head in range(heads) for slot in range(slots))
    best = places[: heads * problem.budget]
    assert kept == [{slot for _, slot, head in best if head == one} for one in range(view.kv_heads)]


@pytest.mark.parametrize(
    "text",
    [
        "adakv:budget=64,base=random:seed=3",
        "pyramidkv:base=key_norm,beta=5",
        "adakv:base=pyramidkv:base=random:window=4:seed=3,page=8",
        "adakv:window=8,kernel=3,base=pyramidkv,beta=5",
    ],
)
def test_text_and_json_of_a_base(text: str) -> None:
    config = parse(text)
    assert config is not None and parse(config.spec()) == config
    assert configure(config.name, config.changed()) == config


def test_options_reach_the_base() -> None:
    config = AdaKV(budget=64, base="pyramidkv:base=random:window=4:seed=3", beta=5, skip_layers=(1,))
    assert config.scorer == PyramidKV(budget=64, base="random:window=4:seed=3", beta=5, skip_layers=(1,))
    assert config.score_method == RandomKV(budget=64, window=4, seed=3, skip_layers=(1,))
    assert AdaKV(window=8, kernel=3, pool="avg").score_method == SnapKV(window=8, kernel=3, pool="avg")
    assert (config.reserved, config.observed_queries) == (4, 0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "adakv:base=h2o",
            r"base='h2o' is not allowed; give a method with a score \(snapkv, pyramidkv, random, key_norm",
        ),
        ("adakv:base=half_newest", "base='half_newest' is not allowed"),
        ("adakv:base=adakv", "base='adakv' is not allowed"),
        ("pyramidkv:base=pyramidkv", r"give a method with a score \(snapkv, random, key_norm\)"),
        ("adakv:beta=5", "beta=5 is not allowed; give it together with base='pyramidkv'"),
        ("adakv:base=key_norm,kernel=3", "kernel=3 is not allowed; give it together with base='snapkv'"),
        ("adakv:base=random,window=8", "window=8 is not allowed"),
        ("adakv:base=snapkv:kernel=3", "give kernel to adakv itself"),
        ("adakv:base=random:budget=64", "give budget to adakv itself"),
        ("adakv:base=random:sed=3", "base=random:sed=3: unknown option 'sed'. Did you mean 'seed'"),
        ("adakv:base=random:seed=x", "base=random:seed=x: seed='x' is not allowed; give an integer"),
        ("adakv:base=random:seed", "seed='' is not allowed"),
        ("adakv:base=random,budget=8", r"base=random: budget=8 is not allowed; give an integer above 32 \(the last 32"),
        ("adakv:budget=8", r"adakv: budget=8 is not allowed; give an integer above 32 \(the observation window of 32"),
        ("adakv:base=key_norm,normalize=true", "normalize=True is not allowed; give false with base=key_norm"),
    ],
)
def test_what_a_division_cannot_go_with(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        parse(text)
    assert str(caught.value).startswith(text.partition(":")[0])
