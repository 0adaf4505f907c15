"""Options of the methods on visual tokens: budgets, ratios, layers, and choices that need no model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_accel import ConfigError, DyVTE, FastV, FlowCut, RandomTokens, StrideTokens, VisionZip
from llm_accel.methods import CutView

CPU = torch.device("cpu")


@given(st.integers(1, 700), st.integers(1, 700), st.sampled_from([StrideTokens, RandomTokens]))
def test_exactly_the_target_in_order(count: int, budget: int, kind: type) -> None:
    chosen = kind(budget=budget).choose(count, None, CPU).tolist()
    assert len(chosen) == min(count, budget)
    assert chosen == sorted(set(chosen)) and chosen[0] >= 0 and chosen[-1] < count


@pytest.mark.parametrize(
    ("ratio", "count", "kept"), [(1.0, 7, 7), (0.5, 7, 4), (0.1, 7, 1), (1e-9, 7, 1), (0.3, 10, 3)]
)
def test_ratio_rounds_up(ratio: float, count: int, kept: int) -> None:
    assert StrideTokens(ratio=ratio).tokens(count) == kept


def test_defaults_and_shared_targets() -> None:
    assert FlowCut().tokens(576) == 192 and FastV().tokens(576) == 288
    assert FlowCut(budget=160).tokens(576, parts=5) == 32
    assert FlowCut(ratio=0.25).tokens(576, parts=5) == 144


def test_random_draw_follows_its_seed() -> None:
    first, again, other = (RandomTokens(budget=20, seed=seed).choose(100, None, CPU).tolist() for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("options", [{"budget": 0}, {"ratio": 0.0}, {"ratio": 1.1}, {"budget": 3, "ratio": 0.5}])
@pytest.mark.parametrize("kind", [FlowCut, FastV, StrideTokens, RandomTokens])
def test_refused_amounts(kind: type, options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"budget|ratio"):
        kind(**options)


@pytest.mark.parametrize(
    ("given_exit", "layers", "layer"), [(0, 4, 0), (3, 4, 3), (0.5, 32, 15), (0.6, 32, 18), (0.01, 4, 0)]
)
def test_exit_layers(given_exit: float, layers: int, layer: int) -> None:
    assert DyVTE(exit=given_exit).after(layers) == layer


@pytest.mark.parametrize("given_exit", [-1, 1.5, -0.2])
def test_refused_exits(given_exit: float) -> None:
    with pytest.raises(ConfigError, match="exit"):
        DyVTE(exit=given_exit)


@pytest.mark.parametrize(
    "options",
    [
        {"exit": 2, "calibration": "a"},
        {"exit": "calibrated", "routers": "b"},
        {"calibration": "a", "routers": "b"},
    ],
)
def test_one_thing_chooses_the_exit(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="given together; give one of them"):
        DyVTE(**options)
    assert DyVTE().after(32) == DyVTE(exit=0.6).after(32)
    with pytest.raises(ConfigError, match="depends on the model"):
        DyVTE(exit="calibrated").after(4)


def test_layers_that_a_model_lacks() -> None:
    with pytest.raises(ConfigError, match="layers 0 to 3"):
        DyVTE(exit=4).after(4)
    with pytest.raises(ConfigError, match="layers 0 to 3"):
        FastV(layer=4).after(4)
    with pytest.raises(ConfigError, match="at least 1"):
        FastV(layer=0)
    assert FastV(layer=2).after(4) == 1


def test_fastv_keeps_text_and_the_best_of_each_row() -> None:
    visual = torch.tensor([[False, True, True, True, True, False], [False, False, True, True, False, False]])
    real = torch.tensor([[True] * 6, [False] + [True] * 5])
    attention = torch.tensor([[9, 0.1, 0.4, 0.4, 0.2, 9], [9, 9, 0.3, 0.5, 9, 9]])
    kept = FastV(ratio=0.5).keep(CutView(visual, real, attention))
    assert kept.tolist() == [[True, False, True, True, False, True], [False, True, False, True, True, True]]


def test_scores_of_any_sign_are_ordered() -> None:
    visual = torch.tensor([[False, True, True, True, True, False]])
    attention = torch.tensor([[9, -0.1, -0.4, -0.3, -2.0, 9]])
    kept = FastV(ratio=0.5).keep(CutView(visual, torch.ones_like(visual), attention))
    assert kept.tolist() == [[True, True, False, True, False, True]]
    scores = attention[0, 1:5]
    assert FlowCut(budget=2).choose(4, scores, CPU).tolist() == [0, 2]
    dominant, contextual = VisionZip(dominant=2, contextual=1, variant="spread").split(scores, 3)
    assert dominant.tolist() == [0, 2] and contextual.tolist() == [3]
