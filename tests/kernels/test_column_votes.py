"""Column votes against a dense softmax in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_accel.kernels.column_votes import column_votes, reference

CLOSE = 2e-5


@dataclass
class Case:
    """One problem with random inputs; ``key_heads`` is what attention sees, ``heads`` what the cache stores."""

    batch: int = 2
    query_heads: int = 8
    key_heads: int = 2
    heads: int = 2
    width: int = 5
    slots: int = 23
    dim: int = 8
    padding: tuple[int, ...] | None = None
    scaling: float = 0.5
    softcap: float | None = None
    with_sinks: bool = False
    group: Literal["mean", "max"] = "mean"
    seed: int = 0
    query: Tensor = field(init=False)
    key: Tensor = field(init=False)
    sinks: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.query = torch.randn(self.batch, self.query_heads, self.width, self.dim, generator=generator)
        self.key = torch.randn(self.batch, self.key_heads, self.slots, self.dim, generator=generator)
        self.sinks = torch.randn(self.query_heads, generator=generator) if self.with_sinks else None

    @property
    def start(self) -> Tensor | None:
        return None if self.padding is None else torch.tensor(self.padding)

    def lse(self) -> Tensor:
        """Log-sum-exp of each query in float64, fp32 [B, Hq, W]; NaN where a query sees nothing."""
        key = self.key.repeat_interleave(self.query_heads // self.key_heads, 1).double()
        logits = self.query.double() @ key.transpose(2, 3) * self.scaling
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        own = torch.arange(self.slots - self.width, self.slots)
        slot = torch.arange(self.slots)
        first = torch.zeros(self.batch, dtype=torch.long) if self.start is None else self.start
        hidden = (slot > own[:, None]) | (slot < first[:, None, None])
        logits = logits.masked_fill(hidden[:, None], -math.inf)
        total = logits.logsumexp(-1)
        if self.sinks is not None:
            total = torch.logaddexp(total, self.sinks.double()[:, None])
        return total.masked_fill((own < first[:, None])[:, None], math.nan).float()

    def votes(self, given: bool = False) -> Tensor:
        return column_votes(
            self.query,
            self.key,
            self.start,
            heads=self.heads,
            scaling=self.scaling,
            softcap=self.softcap,
            sinks=self.sinks,
            group=self.group,
            lse=self.lse() if given else None,
        )

    def oracle(self) -> Tensor:
        """Row by row in float64: softmax over what the query may see, summed over queries, reduced over the group."""
        result = torch.zeros(self.batch, self.query_heads, self.slots, dtype=torch.float64)
        for row in range(self.batch):
            first = 0 if self.padding is None else self.padding[row]
            for head in range(self.query_heads):
                key = self.key[row, head // (self.query_heads // self.key_heads)].double()
                for index in range(self.width):
                    own = self.slots - self.width + index
                    if own < first:
                        continue
                    logits = key[first : own + 1] @ self.query[row, head, index].double() * self.scaling
                    if self.softcap is not None:
                        logits = torch.tanh(logits / self.softcap) * self.softcap
                    extra = logits.new_zeros(0) if self.sinks is None else self.sinks[head : head + 1].double()
                    result[row, head, first : own + 1] += torch.cat([logits, extra]).softmax(0)[: len(logits)]
        grouped = result.view(self.batch, self.heads, -1, self.slots)
        return grouped.amax(2) if self.group == "max" else grouped.mean(2)


CASES = {
    "gqa": Case(),
    "gqa_max": Case(group="max"),
    "one_query_head_per_key_head": Case(query_heads=2),
    "multi_query": Case(key_heads=1, heads=1),
    "latent_cache": Case(query_heads=4, key_heads=4, heads=1),
    "latent_cache_max": Case(query_heads=4, key_heads=4, heads=1, group="max"),
    "softcap": Case(softcap=2.0),
    "sinks": Case(with_sinks=True),
    "left_padding": Case(padding=(0, 9)),
    "padding_reaches_into_the_window": Case(padding=(0, 20)),
    "row_of_padding_only": Case(padding=(0, 23)),
    "everything": Case(padding=(3, 12), softcap=3.0, with_sinks=True, group="max"),
    "window_is_the_prompt": Case(width=23),
    "window_longer_than_the_prompt": Case(width=30),
    "one_slot": Case(width=1, slots=1),
    "one_query": Case(width=1),
    "no_query": Case(width=0),
}


@pytest.mark.parametrize("block", [1, 7, 4096])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_oracle(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "KEY_BLOCK", block)
    case = CASES[name]
    votes = case.votes()
    assert votes.dtype == torch.float32
    assert votes.shape == (case.batch, case.heads, case.slots)
    assert torch.isfinite(votes).all()
    assert (votes.double() - case.oracle()).abs().max() <= CLOSE


@pytest.mark.parametrize("name", CASES)
def test_the_log_sum_exp_of_attention_saves_a_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "row_logsumexp", lambda *_: pytest.fail("a second pass"))
    votes = CASES[name].votes(given=True)
    assert (votes.double() - CASES[name].oracle()).abs().max() <= CLOSE


def test_block_boundary_at_its_real_size() -> None:
    case = Case(batch=1, query_heads=2, key_heads=1, heads=1, width=3, slots=reference.KEY_BLOCK + 5, dim=4)
    assert (case.votes().double() - case.oracle()).abs().max() <= CLOSE


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    groups=st.sampled_from([1, 2, 4, 8]),
    key_heads=st.integers(1, 3),
    width=st.integers(1, 9),
    slots=st.integers(1, 40),
    padded=st.booleans(),
    softcap=st.sampled_from([None, 1.0, 30.0]),
    with_sinks=st.booleans(),
    group=st.sampled_from(["mean", "max"]),
    scaling=st.sampled_from([0.1, 1.0, 4.0]),
    seed=st.integers(0, 1000),
)
def test_equals_the_oracle_for_any_shape(
    groups: int,
    key_heads: int,
    width: int,
    slots: int,
    padded: bool,
    softcap: float | None,
    with_sinks: bool,
    group: Literal["mean", "max"],
    scaling: float,
    seed: int,
) -> None:
    case = Case(
        query_heads=groups * key_heads,
        key_heads=key_heads,
        heads=key_heads,
        width=width,
        slots=slots,
        padding=(0, slots // 2) if padded else None,
        softcap=softcap,
        with_sinks=with_sinks,
        group=group,
        scaling=scaling,
        seed=seed,
        dim=4,
    )
    votes = case.votes()
    assert (votes.double() - case.oracle()).abs().max() <= CLOSE
    assert (votes >= 0).all()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.group == "mean" and not case.with_sinks])
def test_every_query_spends_one_vote(name: str) -> None:
    case = CASES[name]
    first = case.padding or (0,) * case.batch
    voters = torch.tensor([min(case.width, case.slots - padding) for padding in first], dtype=torch.float32)
    total = case.votes().sum(-1)
    assert torch.allclose(total, voters[:, None].expand_as(total), atol=1e-4)


def test_sinks_take_a_share_of_each_vote() -> None:
    case = Case(with_sinks=True)
    assert (case.votes().sum(-1) < case.width - 1e-3).all()


def test_padding_gets_no_vote() -> None:
    votes = Case(padding=(4, 11)).votes()
    assert (votes[0, :, :4] == 0).all()
    assert (votes[1, :, :11] == 0).all()
    assert (votes[1, :, 11:] > 0).all()


def test_a_padded_row_votes_like_the_row_alone() -> None:
    padded = Case(batch=1, padding=(9,), softcap=4.0, with_sinks=True)
    alone = Case(batch=1, slots=14, softcap=4.0, with_sinks=True)
    alone.query, alone.key, alone.sinks = padded.query, padded.key[:, :, 9:], padded.sinks
    assert torch.allclose(padded.votes()[..., 9:], alone.votes(), atol=1e-6)


def test_the_scale_is_the_models_own() -> None:
    case = Case(scaling=1.3)
    assert case.scaling != case.dim**-0.5
    wrong = Case(scaling=case.dim**-0.5)
    assert not torch.equal(case.votes().argsort(-1), wrong.votes().argsort(-1))
    assert torch.equal(case.votes().topk(4).indices, case.oracle().topk(4).indices)


def test_large_logits_neither_overflow_nor_underflow() -> None:
    case = Case(scaling=1e4)
    assert (case.votes().double() - case.oracle()).abs().max() <= 1e-3
    assert math.isclose(float(case.votes()[0, 0].sum()), case.width, abs_tol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_scored_in_fp32(dtype: torch.dtype) -> None:
    case = Case()
    case.query, case.key = case.query.to(dtype), case.key.to(dtype)
    votes = case.votes()
    assert votes.dtype == torch.float32
    assert (votes.double() - case.oracle()).abs().max() <= CLOSE


def test_rounded_probabilities_are_on_the_grid_of_their_dtype() -> None:
    case = Case(batch=1, query_heads=1, key_heads=1, heads=1, width=1)
    options = {"heads": 1, "scaling": case.scaling}
    exact = column_votes(case.query, case.key, None, **options)
    rounded = column_votes(case.query, case.key, None, round_to=torch.bfloat16, **options)
    assert torch.equal(rounded, exact.to(torch.bfloat16).float())
    assert not torch.equal(rounded, exact)


def test_inputs_are_left_as_they_are() -> None:
    case = Case(softcap=2.0, padding=(0, 5))
    query, key = case.query.clone(), case.key.clone()
    case.votes()
    assert torch.equal(case.query, query)
    assert torch.equal(case.key, key)
