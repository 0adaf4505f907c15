"""VisionZip's choice and merging against float64, and the shares of its budget."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_accel import ConfigError, VisionZip
from llm_accel.methods import TowerView
from llm_accel.methods.visual.tower import received, relation


@pytest.mark.parametrize(
    ("options", "kept", "contextual"),
    [
        ({}, 64, 10),
        ({"budget": 128}, 128, 20),
        ({"budget": 192}, 192, 30),
        ({"ratio": 1 / 9}, 64, 10),
        ({"dominant": 191, "contextual": 30}, 221, 30),
        ({"dominant": 8, "contextual": 0}, 8, 0),
        ({"budget": 1}, 1, 0),
    ],
)
def test_shares(options: dict[str, float], kept: int, contextual: int) -> None:
    method = VisionZip(**options)
    assert method.tokens(576) == kept
    parts = method.split(torch.rand(576), kept)
    assert [len(part) for part in parts] == [kept - contextual, contextual]


def test_tiles_share_a_target_and_few_tokens_stay() -> None:
    assert VisionZip().tokens(576, parts=5) == 13
    assert VisionZip().tokens(40) == 40


@settings(max_examples=30)
@given(
    st.integers(2, 40), st.integers(1, 30), st.integers(0, 9), st.integers(0, 99), st.sampled_from(["paper", "spread"])
)
def test_groups_and_averages(count: int, dominant: int, contextual: int, seed: int, variant: str) -> None:
    """Every token is in one group: those of dominant tokens have one member."""
    if dominant + contextual >= count:
        return
    draw = torch.Generator().manual_seed(seed)
    scores = torch.rand(count, generator=draw)
    metric, features = (torch.randn(count, width, generator=draw, dtype=torch.float64) for width in (3, 4))
    method = VisionZip(dominant=dominant, contextual=contextual, variant=variant)
    best, centres = method.split(scores, dominant + contextual)
    merged = method.merge(features, (best, centres), metric)
    assert best.tolist() == sorted(sorted(range(count), key=lambda i: (-float(scores[i]), i))[:dominant])
    rest = [token for token in range(count) if token not in best]
    groups = {centre: [centre] for centre in centres.tolist()}
    for token in rest:
        if groups and token not in groups:
            alike = {centre: torch.cosine_similarity(metric[token], metric[centre], dim=0) for centre in groups}
            groups[max(groups, key=lambda centre: alike[centre])].append(token)
    assert set(groups) <= set(rest) and len(groups) == contextual
    for token in range(count):
        expected = features[groups.get(token, [token])].mean(0)
        if variant == "paper" and token in groups:
            joined = [other for other in groups[token] if other != token]
            expected = features[token] + (features[joined].mean(0) if joined else 0.0)
        assert torch.allclose(merged[token], expected, atol=1e-5)


def test_contextual_tokens_are_spread_over_what_is_left() -> None:
    scores = torch.zeros(24)
    scores[2:6] = torch.arange(4.0) + 1
    best, centres = VisionZip(dominant=4, contextual=4, variant="spread").split(scores, 8)
    assert best.tolist() == [2, 3, 4, 5]
    assert centres.tolist() == [6, 11, 16, 21]  # the rest is 0, 1, 6, 7, ...: its places 2, 7, 12, 17
    best, centres = VisionZip(dominant=4, contextual=4).split(scores, 8, others=1)
    assert best.tolist() == [3, 4, 5]
    assert centres.tolist() == [0, 8, 13, 18]  # the rest is 0, 1, 2, 6, ...: every fifth of its 21


def test_scores_with_and_without_class_token(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = (torch.randn(2, 3, 7, 4) for _ in range(2))
    view = TowerView(query, key, key, scaling=0.3, class_token=True, valid=None, layer=0, last=0)
    maps = (0.3 * query.double() @ key.double().mT).softmax(-1).mean(1)
    assert torch.allclose(VisionZip().score(view, None).double(), maps[:, 0, 1:], atol=1e-6)
    assert torch.equal(VisionZip().score(view, torch.ones(2, 6)), relation(view)[:, 1:])
    assert torch.allclose(VisionZip().metric(view), key.mean(1)[:, 1:])
    view = TowerView(query, key, key, scaling=0.3, class_token=False, valid=None, layer=0, last=0)
    assert torch.allclose(VisionZip().score(view, None).double(), maps.mean(1), atol=1e-6)
    monkeypatch.setattr(sys.modules["llm_accel.methods.visual.tower"], "_BLOCK", 90)  # two queries at a time
    assert torch.allclose(received(view).double(), maps.mean(1), atol=1e-6)
    padded = TowerView(*(torch.cat([one[:, :, :2], one], 2) for one in (query, key, key)), 0.3, False, None, 0, 0)
    valid = torch.tensor([[False] * 2 + [True] * 7] * 2)
    hidden = TowerView(padded.query, padded.key, padded.value, 0.3, False, valid, 0, 0)
    assert torch.allclose(received(hidden)[:, 2:].double(), maps.mean(1), atol=1e-6)
    assert not received(hidden)[:, :2].any()


@pytest.mark.parametrize("options", [{"dominant": 0}, {"contextual": -1}, {"budget": 9, "ratio": 0.2}])
def test_refused_options(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="visionzip"):
        VisionZip(**options)
