"""The total order behind every choice, against a plain-python sort, and the arithmetic of budgets."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_accel import ConfigError, RandomKV, SnapKV, StreamingLLM
from llm_accel.methods import PromptView
from llm_accel.methods.selection import real_slots, select_top

# few distinct values, so that ties are the rule
SCORES = st.sampled_from([0.0, 1e-38, 0.25, 0.5, 1.0, 3.0])


@st.composite
def choices(draw: st.DrawFn) -> dict[str, Tensor | int]:
    batch, heads, slots = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 16))

    def numbers() -> Tensor:
        flat = draw(st.lists(SCORES, min_size=batch * heads * slots, max_size=batch * heads * slots))
        return torch.tensor(flat).view(batch, heads, slots)

    starts = [draw(st.integers(0, slots - 1)) for _ in range(batch)]
    width = draw(st.integers(1, slots))
    forced = torch.tensor(draw(st.lists(st.booleans(), min_size=batch * slots, max_size=batch * slots)))
    return {
        "score": numbers(),
        "counts": torch.tensor([min(width, slots - start) for start in starts]),
        "width": width,
        "valid": real_slots(torch.tensor(starts), slots, torch.device("cpu")),
        "forced": forced.view(batch, slots),
        "tie_break": numbers(),
    }


def oracle(case: dict[str, Tensor | int]) -> list[list[list[int]]]:
    """The documented order as a sort of tuples."""
    score, tie, valid, forced = (case[name].tolist() for name in ("score", "tie_break", "valid", "forced"))
    rows = []
    for row, count in enumerate(case["counts"].tolist()):
        heads = []
        for head in range(len(score[row])):
            slots = [slot for slot in range(len(valid[row])) if valid[row][slot]]

            def order(slot: int, row: int = row, head: int = head) -> tuple[float, ...]:
                if forced[row][slot]:
                    return (0.0, 0.0, 0.0, slot)
                return (1.0, -score[row][head][slot], -tie[row][head][slot], slot)

            best = sorted(sorted(slots, key=order)[:count])
            heads.append([-1] * (case["width"] - count) + best)
        rows.append(heads)
    return rows


@settings(max_examples=150, deadline=None, derandomize=True)
@given(choices())
def test_select_top_is_the_documented_order(case: dict[str, Tensor | int]) -> None:
    assert select_top(**case).tolist() == oracle(case)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(choices(), st.randoms(use_true_random=False))
def test_permuted_heads_give_permuted_choices(case: dict[str, Tensor | int], random: object) -> None:
    order = torch.randperm(case["score"].shape[1], generator=torch.Generator().manual_seed(random.randint(0, 99)))
    expected = select_top(**case)[:, order]
    case["score"], case["tie_break"] = case["score"][:, order], case["tie_break"][:, order]
    assert torch.equal(select_top(**case), expected)


def test_subnormal_infinite_and_missing_scores() -> None:
    score = torch.tensor([[[float("nan"), 1e-45, 0.0, float("inf"), -1.0, -0.0]]])
    valid = torch.ones(1, 6, dtype=torch.bool)
    order = [select_top(score, torch.tensor([count]), count, valid)[0, 0].tolist() for count in (1, 2, 3, 6)]
    assert order == [[3], [1, 3], [0, 1, 3], [0, 1, 2, 3, 4, 5]]


def test_ranks_and_lengths_count_from_the_first_real_slot() -> None:
    view = PromptView(torch.zeros(2, 2, 1, 4), torch.zeros(2, 2, 3, 4), 2, None, 1.0, None, None, layer=0, layers=1)
    assert view.ranks.tolist() == [[0, 1, 2]]
    assert view.lengths.tolist() == [3, 3]
    rows = replace(view, start=torch.tensor([0, 2]))
    assert rows.ranks.tolist() == [[0, 1, 2], [-2, -1, 0]]
    assert rows.lengths.tolist() == [3, 1]
    heads = replace(view, start=torch.tensor([[0, 1], [2, 3]]))
    assert heads.ranks.tolist() == [[[0, 1, 2], [-1, 0, 1]], [[-2, -1, 0], [-3, -2, -1]]]
    assert heads.lengths.tolist() == [[3, 2], [1, 0]]


def test_real_slots() -> None:
    assert real_slots(None, 3, torch.device("cpu")).tolist() == [[True] * 3]
    assert real_slots(torch.tensor([0, 2, 3]), 3, torch.device("cpu")).tolist() == [
        [True, True, True],
        [False, False, True],
        [False, False, False],
    ]


@pytest.mark.parametrize("ratio", [0.01, 0.07, 0.1, 0.29, 0.3, 1 / 3, 0.57, 0.7, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("config", [SnapKV, StreamingLLM, RandomKV])
def test_ratio_keeps_its_fraction_rounded_up(config: type, ratio: float) -> None:
    method = config(ratio=ratio)
    lengths = torch.arange(0, 3000)
    counts = [method.entries(length) for length in lengths.tolist()]
    exact = Fraction(ratio).limit_denominator(10_000)
    for length, count in enumerate(counts):
        assert count == min(length, max(math.ceil(exact * length), method.reserved, 1))
    assert method.entries_per_row(lengths).tolist() == counts


@pytest.mark.parametrize("config", [SnapKV, StreamingLLM, RandomKV])
def test_budget_is_a_number_of_entries(config: type) -> None:
    lengths = torch.arange(0, 5000, 7)
    for method, most in ((config(budget=100), 100), (config(), 2048)):
        counts = [method.entries(length) for length in lengths.tolist()]
        assert counts == [min(length, most) for length in lengths.tolist()]
        assert method.entries_per_row(lengths).tolist() == counts


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        (SnapKV, {"budget": 0}, "budget=0"),
        (SnapKV, {"budget": -5}, "budget=-5"),
        (SnapKV, {"budget": 32}, "above 32"),
        (SnapKV, {"budget": 64, "ratio": 0.5}, "give one of them"),
        (SnapKV, {"ratio": 0.0}, r"\(0, 1\]"),
        (SnapKV, {"ratio": 1.5}, r"ratio=1.5"),
        (SnapKV, {"ratio": float("nan")}, "finite"),
        (SnapKV, {"kernel": 4}, "odd"),
        (SnapKV, {"window": 0}, "at least 1"),
        (SnapKV, {"pool": "mean"}, "max.*avg"),
        (SnapKV, {"skip_layers": (1, 1)}, "distinct"),
        (SnapKV, {"skip_layers": (-1,)}, "counted from 0"),
        (StreamingLLM, {"budget": 4}, "4 sinks"),
        (StreamingLLM, {"sinks": -1}, "at least 0"),
        (RandomKV, {"budget": 32}, "last 32"),
        (RandomKV, {"window": -1}, "at least 0"),
    ],
)
def test_impossible_options_say_what_is_allowed(config: type, options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(**options)
