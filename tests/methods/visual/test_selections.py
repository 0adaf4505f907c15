"""DivPrune, CDPruner, PruneSID and DART against versions in float64 that try every candidate."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_accel import DART, CDPruner, ConfigError, DivPrune, PruneSID
from llm_accel.methods import CutView
from tests import selection_oracle


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 9))
def test_tokens_of_divprune_and_cdpruner(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    features, text = torch.randn(count, 16, generator=generator), torch.randn(4, 16, generator=generator)
    for kept in range(1, count):
        assert DivPrune().pick(features, text, kept).tolist() == selection_oracle.divprune(features, kept)
        if kept < count - 1:  # the least relevant token makes the kernel all but singular
            assert CDPruner().pick(features, text, kept).tolist() == selection_oracle.cdpruner(features, text, kept)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 24), st.integers(1, 6))
def test_tokens_of_prunesid(seed: int, count: int, per_direction: int) -> None:
    features = torch.randn(count, 12, generator=torch.Generator().manual_seed(seed))
    features += 2 * features[: 1 + count // 3].repeat(3, 1)[:count]  # some resemble each other
    for kept in range(1, count):
        found = PruneSID(per_direction=per_direction).pick(features, features[:0], kept).tolist()
        assert found == selection_oracle.prunesid(features, kept, per_direction)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 10), st.integers(1, 5), st.integers(0, 3))
def test_tokens_of_dart(seed: int, kept: int, pivots: int, words: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    states, norms = torch.randn(1, 20, 8, generator=generator), torch.rand(1, 20, generator=generator)
    visual = torch.zeros(1, 20, dtype=torch.bool)
    visual[0, 4:16] = True
    method = DART(budget=kept, visual_pivots=pivots, text_pivots=words)
    keep = method.keep(CutView(visual, torch.ones_like(visual), norms, states))
    assert keep[0, ~visual[0]].all()
    stay = (keep & visual)[0].nonzero()[:, 0].tolist()
    assert stay == selection_oracle.dart(states[0], norms[0], visual[0], kept, pivots, words)
    assert len(stay) == kept


def test_duplicates_leave_first() -> None:
    """Three copies of one token and two others: one of each stays."""
    base = torch.eye(3, 8)
    features = torch.stack([base[0], base[0] * 2, base[1], base[0] * 3, base[2]])
    for method in (DivPrune(), CDPruner(), PruneSID(per_direction=1)):
        kept = set(method.pick(features, torch.ones(1, 8), 3).tolist())
        assert {2, 4} < kept
    assert CDPruner().pick(features, torch.zeros(0, 8), 3).tolist() == [0, 2, 4]


def test_the_question_decides_for_cdpruner() -> None:
    features = torch.eye(6, 8)
    asked = features[4:5] + 0.1 * features[2:3]
    assert CDPruner().pick(features, asked, 2).tolist() == [2, 4]


def test_layers_of_dart() -> None:
    assert DART(layer=2).after(4) == 1
    with pytest.raises(ConfigError, match="has layers 0 to 3"):
        DART(layer=4).after(4)
