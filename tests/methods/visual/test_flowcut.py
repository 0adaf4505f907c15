"""FlowCut's formulas against numbers worked out by hand, and its schedule against the published one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_accel import FlowCut
from llm_accel.methods import TowerView
from llm_accel.methods.visual.flowcut import density, entropy, semantics
from llm_accel.methods.visual.tower import relation


def view(query, key, value, *, class_token=True, valid=None, layer=0, last=0, scaling=1.0) -> TowerView:
    """One image, one head, from lists of rows [S, d]."""
    tensors = (torch.tensor(rows, dtype=torch.float32)[None, None] for rows in (query, key, value))
    return TowerView(*tensors, scaling=scaling, class_token=class_token, valid=valid, layer=layer, last=last)


def test_scores_by_hand() -> None:
    """Class token and three patches, d = 2, two layers."""
    third = math.log(3)
    one = view([[1, 0]] * 4, [[0, 0], [third, 9], [0, 9], [third, 9]], [[1, 0], [0, 2], [third, -1], [0, 0]])
    assert torch.allclose(relation(one), torch.tensor([[1, 3, 1, 3]]) / 8)
    logits = torch.tensor([1, 0, third, 0]).exp()
    assert torch.allclose(semantics(one), (logits / logits.sum())[None])
    assert torch.allclose(density(one), torch.tensor([[1, 2, third + 1, 0]]))
    expected = torch.tensor([(3 / 7 + 1 / 5) * 2, (1 / 7 + 3 / 5) * (third + 1), 0.0])
    first = FlowCut().score(one, None)
    assert torch.allclose(first, expected[None], atol=1e-6)
    second = FlowCut(ema=0.25).score(one, first * 5)
    assert torch.allclose(second, expected[None] * (0.75 * 5 + 0.25), atol=1e-5)


def test_semantics_are_not_scaled_and_relation_is() -> None:
    rows = [[2.0, 0.0], [1.0, 1.0], [0.0, 3.0]]
    assert torch.equal(semantics(view(rows, rows, rows, scaling=0.1)), semantics(view(rows, rows, rows)))
    assert not torch.equal(relation(view(rows, rows, rows, scaling=0.1)), relation(view(rows, rows, rows)))


def test_without_class_token_the_mean_query_asks() -> None:
    rows = torch.randn(5, 3).tolist()
    mean = torch.tensor(rows).mean(0)
    given_view = view(rows, rows, rows, class_token=False)
    expected = (torch.tensor(rows) @ mean).softmax(0)
    assert torch.allclose(relation(given_view)[0], expected)
    assert torch.allclose(FlowCut().score(given_view, None)[0], expected * torch.tensor(rows).abs().sum(-1))


def test_padding_counts_nowhere() -> None:
    rows = torch.randn(6, 3).tolist()
    short, padded = rows[:4], rows[:1] + rows[4:] + rows[1:4]
    valid = torch.tensor([[True, False, False, True, True, True]])
    for class_token in (True, False):
        if not class_token:
            short, padded, valid = rows[1:4], rows[4:] + rows[1:4], valid[:, 1:]
        alone = view(short, short, short, class_token=class_token)
        beside = view(padded, padded, padded, class_token=class_token, valid=valid)
        scores = FlowCut().score(beside, None)
        assert torch.allclose(scores[:, 2:], FlowCut().score(alone, None), atol=1e-6)
        assert not scores[:, :2].any()
        assert torch.allclose(entropy(beside), entropy(alone), atol=1e-6)


@pytest.mark.parametrize(("attended", "spread"), [("uniform", 1.0), ("one", 0.0)])
def test_entropy_and_what_it_cuts(attended: str, spread: float) -> None:
    """Uniform attention cuts nothing before the forced cut, attention to one patch (N - T) / sqrt(layers to go)."""
    patches, budget, to_go = 100, 20, 4
    keys = torch.zeros(patches + 1, 2)
    if attended == "one":
        keys[7] = 1e4  # so far ahead that all other probabilities underflow
    layer = view(torch.ones_like(keys).tolist(), keys.tolist(), keys.tolist(), layer=6, last=6 + to_go)
    assert torch.allclose(entropy(layer), torch.tensor([spread]), atol=1e-6)
    sizes = FlowCut().survivors(layer, torch.tensor([patches]), torch.tensor([budget]))
    assert int(sizes) == patches - round((patches - budget) / math.sqrt(to_go) * (1 - spread**2))


def test_static_schedule_of_clip() -> None:
    """576 patches to 64 over 24 layers: every second layer, as for entropy 0.8, all the rest after layer 21."""
    sizes, trace = torch.tensor([576]), []
    for layer in range(22):
        blank = view([[0.0]], [[0.0]], [[0.0]], layer=layer, last=21)
        after = FlowCut(schedule="static").survivors(blank, sizes, torch.tensor([64]))
        assert torch.equal(after, sizes) or layer % 2 == 1
        if layer % 2 == 1:
            trace.append(int(after))
        sizes = after
    expected, left = [], 576
    for layer in range(1, 21, 2):
        left -= round((left - 64) / math.sqrt(21 - layer) * (1 - 0.8**2))
        expected.append(left)
    assert trace == [*expected, 64]


@given(st.lists(st.floats(0, 9, width=32), min_size=1, max_size=40), st.integers(1, 50), st.randoms())
def test_choice_has_no_favourite_place(scores: list[float], budget: int, random) -> None:
    """Exactly the budget, ascending; permuted scores choose the permuted patches, equal ones the earlier."""
    method, values = FlowCut(budget=budget), torch.tensor(scores)
    chosen = method.choose(len(scores), values, values.device)
    assert chosen.tolist() == sorted(set(chosen.tolist())) and len(chosen) == min(budget, len(scores))
    assert chosen.tolist() == sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:budget])
    order = list(range(len(scores)))
    random.shuffle(order)
    again = method.choose(len(scores), values[order], values.device)
    assert sorted(scores[order[i]] for i in again.tolist()) == sorted(scores[i] for i in chosen.tolist())


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_nearly_the_same(kind: torch.dtype) -> None:
    """CLIP-L/14-336 shapes: scores are fp32 whatever the tower runs in."""
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randn(1, 16, 577, 64, generator=draw) for _ in range(3)]
    kept = []
    for tensors in (rows, [one.to(kind) for one in rows]):
        scores = FlowCut().score(TowerView(*tensors, 0.125, True, None, 0, 0), None)
        assert scores.dtype is torch.float32
        kept.append(set(FlowCut(budget=192).choose(576, scores[0], scores.device).tolist()))
    assert len(kept[0] & kept[1]) >= (0.98 if kind is torch.float16 else 0.95) * 192


@pytest.mark.parametrize(
    "option",
    [{"ema": 0.0}, {"ema": 1.5}, {"cut_every": 0}, {"schedule": "fast"}, {"vision_factor": 1.0}, {"llm_layer": -1}],
)
def test_refused_options(option: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="flowcut"):
        FlowCut(**option)
