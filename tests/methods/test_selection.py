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
from llm_accel.methods.selection import ABSENT, FIRST, real_slots, select_top, top_tokens, total_order, without

# few distinct values, so that ties are the rule
NAN = float("nan")
SCORES = st.sampled_from([NAN, -math.inf, -3e38, -2.5, -1e-45, -0.0, 0.0, 1e-38, 0.25, 1.0, 3e38, math.inf])


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

    def above(value: float) -> tuple[bool, float]:
        return (True, 0.0) if math.isnan(value) else (False, -value)

    score, tie, valid, forced = (case[name].tolist() for name in ("score", "tie_break", "valid", "forced"))
    rows = []
    for row, count in enumerate(case["counts"].tolist()):
        heads = []
        for head in range(len(score[row])):
            slots = [slot for slot in range(len(valid[row])) if valid[row][slot]]

            def order(slot: int, row: int = row, head: int = head) -> tuple[object, ...]:
                if forced[row][slot]:
                    return (0, slot)
                return (1, above(score[row][head][slot]), above(tie[row][head][slot]), slot)

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


ASCENDING = [NAN, -math.inf, -3.4e38, -1.5, -1.0, -1e-38, -1e-45, 0.0, 1e-45, 1e-38, 1.0, 1.5, 3.4e38, math.inf]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_float_has_its_place(dtype: torch.dtype) -> None:
    """In the score and in the tie-break alike; forced entries lie above infinity and padding below NaN."""
    values, count = torch.tensor([[ASCENDING]], dtype=dtype), len(ASCENDING)
    real, flat = torch.ones(1, count, dtype=torch.bool), torch.zeros(1, 1, count)
    for score, tie_break in ((values, None), (values, values.flip(-1)), (flat, values), (flat + math.inf, values)):
        rank = total_order(score, real, None, tie_break)[0, 0]
        assert bool((rank.diff() > 0).all())
        assert int(rank.min()) > ABSENT and int(rank.max()) < FIRST
    best = [top_tokens(values[0, 0], kept).tolist() for kept in range(count + 1)]
    assert best == [list(range(count - kept, count)) for kept in range(count + 1)]


def test_zeros_and_nans_tie_whatever_their_bits() -> None:
    score = torch.tensor([[[0.0, -0.0, NAN, -NAN, -1.0]]])
    valid = torch.ones(1, 5, dtype=torch.bool)
    order = [select_top(score, torch.tensor([count]), count, valid)[0, 0].tolist() for count in (1, 2, 3, 4)]
    assert order == [[0], [0, 1], [0, 1, 4], [0, 1, 2, 4]]
    first = select_top(score, torch.tensor([1]), 1, valid, tie_break=torch.tensor([[[-2.0, -1.0, 0.0, 0.0, 0.0]]]))
    assert first.tolist() == [[[1]]]


def test_without_finds_rows_that_lost_an_entry() -> None:
    kept = torch.tensor([[[-1, 2, 3]], [[0, 2, 3]], [[-1, -1, 1]]])
    valid = torch.tensor([[False, False, True, True], [True] * 4, [False, True, True, True]])
    wanted = torch.tensor([[True, True, True, True], [False, True, False, False], [True, True, False, False]])
    assert without(kept, wanted, valid).tolist() == [False, True, False]
    assert without(kept, wanted[:, None], valid).tolist() == [False, True, False]


def test_ranks_and_lengths_count_from_the_first_real_slot() -> None:
    view = PromptView(torch.zeros(2, 2, 1, 4), torch.zeros(2, 2, 3, 4), 2, scaling=1.0, layer=0, layers=1)
    assert view.cache_positions.tolist() == [[0, 1, 2]]
    assert view.lengths.tolist() == [3, 3]
    rows = replace(view, start=torch.tensor([0, 2]))
    assert rows.cache_positions.tolist() == [[0, 1, 2], [-2, -1, 0]]
    assert rows.lengths.tolist() == [3, 1]
    heads = replace(view, start=torch.tensor([[0, 1], [2, 3]]))
    assert heads.cache_positions.tolist() == [[[0, 1, 2], [-1, 0, 1]], [[-2, -1, 0], [-3, -2, -1]]]
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
