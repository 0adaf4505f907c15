"""A method of the user's own: what the tutorial keeps, and what the base does for every score."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from torch import Tensor

from llm_accel import ConfigError, SnapKV
from llm_accel.methods import Depth, MethodInfo, PromptCompression, PromptView, ScoreAndKeep, catalog
from llm_accel.methods.base import option
from llm_accel.methods.kv.snapkv import pooled_votes
from llm_accel.registry import parse
from tests.methods.views import Problem, check_laws, kept_sets, problems, row_of, view_of
from tests.pages import tutorial_method

KeyNorm = tutorial_method()


@dataclass(frozen=True)
class Given(PromptCompression):
    """Scores, ties and entries that stay as a test gives them; nothing is checked before the base does."""

    name: ClassVar[str] = "given"
    info: ClassVar[MethodInfo] = MethodInfo("none", "KV cache after the prompt", needs_query=False, frees_memory=True)
    scores: ClassVar[Tensor]
    ties: ClassVar[Tensor | None] = None
    stay: ClassVar[Tensor | None] = None

    def score_and_tie_break(self, view: PromptView) -> tuple[Tensor, Tensor | None]:
        return self.scores, self.ties

    def always_keep(self, view: PromptView) -> Tensor | None:
        return self.stay


def given_scores(scores: Tensor, budget: int, **more: Tensor) -> Given:
    return type("Mine", (Given,), {"scores": scores, **more})(budget=budget)


def plain(rows: int = 1, heads: int = 1, slots: int = 6) -> PromptView:
    key = torch.ones(rows, heads, slots, 4)
    return PromptView(key[:, :, :0], key, heads, scaling=1.0, layer=0, layers=1)


def smallest_norms(view: PromptView, count: int) -> list[set[int]]:
    """Per KV head, of one row without padding: what is protected, then the smallest norms, then the older entry."""
    norms = view.key.double().norm(dim=-1).unflatten(1, (view.kv_heads, -1)).mean(2)[0]
    protected = [False] * view.slots if view.protected is None else view.protected[0].tolist()
    return [
        set(sorted(range(view.slots), key=lambda slot: (not protected[slot], float(head[slot]), slot))[:count])
        for head in norms
    ]


@given(problem=problems())
def test_the_tutorial_keeps_the_smallest_norms_of_every_row_and_head(problem: Problem) -> None:
    config, view = KeyNorm(budget=problem.budget), view_of(problem)
    kept = kept_sets(check_laws(config, view, always=0))
    for row, length in enumerate(problem.lengths):
        alone, first = row_of(view, row), view.slots - length
        expected = smallest_norms(alone, min(length, problem.budget))
        assert kept[row] == [{slot + first for slot in head} for head in expected]


def test_the_tutorial_reads_keys_that_are_repeated_for_their_queries() -> None:
    view = view_of(Problem((30,), 2, 1, 1, 8, False, 3))
    repeated = replace(view, key=view.key.repeat_interleave(3, 1))
    assert torch.equal(KeyNorm(budget=8).select(repeated), KeyNorm(budget=8).select(view))
    assert kept_sets(KeyNorm(budget=8).select(view))[0] != [set(range(8))] * 2  # the oldest, as if all were equal


def test_negative_scores_ties_and_what_always_stays() -> None:
    scores = torch.tensor([[[-3.0, -1.0, -2.0, -1.0, float("-inf"), float("nan")]]])
    assert given_scores(scores, 3).select(plain()).tolist() == [[[1, 2, 3]]]
    assert given_scores(scores, 1).select(plain()).tolist() == [[[1]]]
    ties = torch.tensor([[[0.0, -2.0, 0.0, -1.0, 0.0, 0.0]]])
    assert given_scores(scores, 1, ties=ties).select(plain()).tolist() == [[[3]]]
    stay = torch.tensor([[False, False, False, False, False, True]])
    assert given_scores(scores, 2, stay=stay).select(plain()).tolist() == [[[1, 5]]]
    assert given_scores(scores, 2, stay=stay[:, None]).select(plain()).tolist() == [[[1, 5]]]
    protected = replace(plain(), protected=torch.tensor([[True, False, False, False, False, False]]))
    assert given_scores(scores, 3, stay=stay).select(protected).tolist() == [[[0, 1, 5]]]


def test_more_that_always_stays_than_the_budget_holds_is_refused() -> None:
    mine = given_scores(torch.zeros(1, 1, 6), 2, stay=torch.arange(6)[None] > 2)
    with pytest.raises(ConfigError, match=r"always keeps 3 entries, more than the budget of row 0: `reserved` is 0"):
        mine.select(plain())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"scores": torch.zeros(1, 4, 6)}, r"score is \(1, 4, 6\); give \(1, 2, 6\)"),
        ({"scores": torch.zeros(6)}, r"score is \(6,\)"),
        ({"ties": torch.zeros(1, 2, 5)}, r"tie_break is \(1, 2, 5\)"),
        ({"stay": torch.ones(1, 5, dtype=torch.bool)}, r"always_keep is torch.bool \(1, 5\); give bool \(1, 6\)"),
        ({"stay": torch.ones(1, 6)}, r"always_keep is torch.float32"),
    ],
)
def test_wrong_shapes_say_which_are_right(more: dict[str, Tensor], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        given_scores(**({"scores": torch.zeros(1, 2, 6), "budget": 2} | more)).select(plain(heads=2))


def test_a_method_without_a_score_says_what_is_missing() -> None:
    class Bare(PromptCompression):
        name = "bare"

    with pytest.raises(NotImplementedError, match=r"Bare has no score\(view\)"):
        Bare(budget=2).select(plain())


@pytest.mark.parametrize(
    "text",
    [
        "lower:budget=12,window=4{}",
        "pyramidkv:budget=12,window=4,beta=4,base=lower{}",
        "adakv:budget=12,window=4,base=lower{}",
        "adakv:budget=12,window=4,rule=blend,beta=4,base=pyramidkv:base=lower{}",
    ],
)
def test_how_a_budget_is_divided_does_not_depend_on_the_sign_of_scores(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores that all lie eight lower keep the same entries."""
    view = replace(view_of(Problem((40, 23), 3, 2, 4, 12, True, 5)), depth=Depth(1, 3))

    @dataclass(frozen=True)
    class Lower(SnapKV):
        name: ClassVar[str] = "lower"
        shift: float = option("how much lower scores are", 0.0)

        def votes(self, view: PromptView) -> tuple[Tensor, Tensor]:
            pooled, raw = ((one * 256).round() / 256 for one in super().votes(view))  # so that no sum is rounded
            return pooled - self.shift, raw - self.shift

    monkeypatch.setitem(catalog._registered, "lower", Lower)
    separator = "," if text.startswith("lower") else ":"
    plain, lower = (parse(text.format(f"{separator}shift={shift}")) for shift in (0.0, 8.0))
    assert isinstance(plain, ScoreAndKeep) and isinstance(lower, ScoreAndKeep)
    assert torch.equal(lower.select(view), plain.select(view))


def test_pooling_takes_scores_of_any_sign_and_no_padding() -> None:
    votes, inside = torch.tensor([[[0.0, -3.0, -1.0, -2.0]]]), torch.tensor([[[False, True, True, True]]])
    assert pooled_votes(votes, inside, 3, "max")[0, 0, 1:].tolist() == [-1.0, -1.0, -1.0]
    assert pooled_votes(votes, inside, 3, "avg")[0, 0, 1:].tolist() == [-2.0, -2.0, -1.5]
