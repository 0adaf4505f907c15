"""``kernel="auto"``: how far votes count, per row, against a loop; and what the report says of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import llm_accel
from llm_accel import AdaKV, ConfigError, PyramidKV, SnapKV
from llm_accel.methods.kv.snapkv import BEFORE, FAINT, FAR, NEAR, carried_votes
from tests.methods.views import Problem, check_laws, choose, kept_sets, problems, row_of, view_of, view_with_votes
from tests.tiny import tiny_model


def carried_by_hand(votes: list[float], reach: int) -> list[float]:
    far = max((distance for distance in FAR if distance <= reach), default=0)
    found = []
    for slot in range(len(votes)):
        near = votes[max(0, slot - NEAR) : slot + 1 + BEFORE]
        faint = votes[max(0, slot - far) : slot + 1 + BEFORE] if far else []
        found.append(max([*near, *(FAINT * vote for vote in faint)]))
    return found


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 90), st.integers(0, 60)), min_size=1, max_size=3), st.integers(0, 999))
def test_each_row_against_a_loop(rows: list[tuple[int, int]], seed: int) -> None:
    longest = max(length for length, _ in rows)
    votes = torch.rand(len(rows), 2, longest, generator=torch.Generator().manual_seed(seed)) ** 8
    padding = torch.tensor([longest - length for length, _ in rows])
    inside = (torch.arange(longest) >= padding[:, None])[:, None]
    reach = torch.tensor([far for _, far in rows])
    carried = carried_votes(votes, inside, reach)
    for row, (length, far) in enumerate(rows):
        for head in range(2):
            alone = votes[row, head, longest - length :].tolist()
            assert carried[row, head, longest - length :].tolist() == pytest.approx(carried_by_hand(alone, far))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems(), st.sampled_from([None, 0.2, 0.6]))
def test_laws_and_independent_rows(problem: Problem, ratio: float | None) -> None:
    if ratio is None:
        check_laws(SnapKV(budget=problem.budget, window=problem.window), view_of(problem), problem.window)
    config = SnapKV(window=problem.window, **({"budget": problem.budget} if ratio is None else {"ratio": ratio}))
    view = view_of(Problem(**{**vars(problem), "protect": False}))
    for row, heads in enumerate(kept_sets(choose(config, view))):
        first = view.slots - problem.lengths[row]
        alone = kept_sets(choose(config, row_of(view, row)))[0]
        assert [{slot - first for slot in head} for head in heads] == alone


def test_a_value_written_in_many_tokens_stays_whole() -> None:
    """One vote on the first of 30 tokens; a kernel of 7 keeps three of those behind it."""
    votes = [0.001] * 300
    votes[100] = 0.5
    view = view_with_votes(votes, window=4)
    assert set(range(100, 131)) <= kept_sets(choose(SnapKV(budget=124, window=4), view))[0][0]
    few = kept_sets(choose(SnapKV(budget=124, window=4, kernel=7, tie="raw"), view))[0][0]
    assert not set(range(104, 131)) <= few
    small = kept_sets(choose(SnapKV(budget=20, window=4), view))[0][0]
    assert set(range(99, 112)) <= small  # no room to reach farther, so that other places can be kept too


@pytest.mark.parametrize("cls", [SnapKV, AdaKV, PyramidKV])
@pytest.mark.parametrize(
    ("options", "choice", "told"),
    [
        ({"budget": 64}, "auto", "a vote counts for 1 entry before it and 11 behind it"),
        ({"budget": 128}, "auto", "11 behind it, a fifth of it for 32"),
        ({"budget": 2048}, "auto", "a fifth of it for 40"),
        ({"ratio": 0.25}, "auto", "a fifth of it for 40, at most a third of the entries that are chosen"),
        ({"budget": 64, "kernel": 7}, "max", "over 7 neighbours"),
        ({"budget": 64, "pool": "avg"}, "avg", "over 15 neighbours"),
    ],
)
def test_the_report_says_what_was_chosen(cls: Any, options: dict[str, Any], choice: str, told: str) -> None:
    model = tiny_model("llama")
    with llm_accel.apply(model, cls(**options)) as handle:
        found, meaning = handle.report().backends["pooling"]
    assert found == choice and told in meaning


def test_the_end_of_the_window_votes() -> None:
    view = view_of(Problem((40,), kv_heads=2, group=2, window=8, budget=12, protect=False, seed=0))
    config = SnapKV(budget=12, window=8)
    assert config.voters == 6
    last = replace(view, query=view.query[:, :, 2:])
    assert torch.equal(config.votes(view)[1], config.votes(last)[1])
    whole = SnapKV(budget=12, window=8, kernel=7)
    assert whole.voters == 8 and not torch.equal(whole.votes(view)[1], whole.votes(last)[1])


def test_another_base_has_no_pooling() -> None:
    with llm_accel.apply(tiny_model("llama"), AdaKV(budget=64, base="random")) as handle:
        assert "pooling" not in handle.report().backends


@pytest.mark.parametrize("kernel", ["Auto", 4, 0, "7.0"])
def test_other_kernels_are_refused(kernel: Any) -> None:
    with pytest.raises(ConfigError, match=r"kernel="):
        SnapKV(budget=64, kernel=kernel)


def test_the_command_line_takes_both() -> None:
    assert SnapKV.parse({"kernel": "auto"}) == SnapKV()
    assert SnapKV.parse({"kernel": "7"}).spec() == "snapkv:kernel=7"
