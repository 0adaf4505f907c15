"""Column votes on Triton against the reference, at sizes that fill no block."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from llm_accel.kernels.column_votes import OP, column_votes, launch
from llm_accel.kernels.column_votes.reference import column_votes_reference, row_logsumexp
from llm_accel.kernels.dispatch import Problem
from tests.kernels.triton_device import DEVICE, assert_close


@dataclass(frozen=True)
class Case:
    batch: int = 1
    query_heads: int = 4
    key_heads: int = 2
    heads: int | None = None
    width: int = 5
    slots: int = 37
    dim: int = 64
    start: tuple[int, ...] | tuple[tuple[int, ...], ...] | None = None
    softcap: float | None = None
    with_sinks: bool = False
    group: str = "mean"
    dtype: torch.dtype = torch.float32
    round_to: torch.dtype | None = None

    def inputs(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Query, key, start and sinks; queries and keys are views with gaps, as models pass them."""
        generator = torch.Generator().manual_seed(0)
        query = torch.randn(self.batch, self.width, self.query_heads, self.dim, generator=generator)
        key = torch.randn(self.batch, self.slots + 3, self.key_heads, self.dim + 16, generator=generator)
        start = None if self.start is None else torch.tensor(self.start, device=DEVICE)
        sinks = torch.randn(self.query_heads, generator=generator).to(DEVICE, self.dtype) if self.with_sinks else None
        key = key.to(DEVICE, self.dtype).transpose(1, 2)[:, :, 3:, : self.dim]
        return query.to(DEVICE, self.dtype).transpose(1, 2), key, start, sinks


CASES = {
    "window": Case(),
    "heads_without_groups": Case(query_heads=2),
    "group_of_three": Case(query_heads=6, width=7),
    "group_of_sixteen": Case(query_heads=16, key_heads=1),
    "prefill_of_several_blocks": Case(query_heads=3, key_heads=1, width=141, slots=141),
    "later_chunk": Case(width=33, slots=150),
    "decode": Case(batch=2, width=1, slots=130, group="sum"),
    "one_slot": Case(width=1, slots=1),
    "window_longer_than_the_prompt": Case(width=9, slots=5),
    "no_query": Case(width=0),
    "batch": Case(batch=3, slots=20),
    "max": Case(query_heads=6, width=20, slots=40, group="max"),
    "latents": Case(query_heads=4, key_heads=4, heads=1),
    "latents_max": Case(query_heads=4, key_heads=4, heads=2, group="max"),
    "softcap": Case(softcap=2.0),
    "learned_sinks": Case(with_sinks=True, query_heads=6),
    "padded_rows": Case(batch=3, start=(0, 34, 37), slots=37, width=6),
    "padded_heads": Case(batch=2, start=((0, 20), (33, 37))),
    "padded_prefill": Case(batch=2, start=(0, 75), width=140, slots=140, with_sinks=True, softcap=5.0),
    "dim_80": Case(dim=80),
    "dim_96": Case(dim=96, group="max"),
    "dim_128": Case(dim=128),
    "dim_256": Case(dim=256, slots=70),
    "fp16": Case(dtype=torch.float16, slots=150, dim=128),
    "bf16": Case(dtype=torch.bfloat16, slots=150, width=40, softcap=30.0, with_sinks=True),
    "rounded_to_fp16": Case(dtype=torch.float16, round_to=torch.float16),
}


def ours(case: Case) -> Tensor:
    query, key, start, sinks = case.inputs()
    heads = case.heads or case.key_heads
    rest = {"scaling": 0.3, "softcap": case.softcap, "sinks": sinks, "group": case.group, "round_to": case.round_to}
    return column_votes(query, key, start, heads=heads, **rest)


def oracle(case: Case) -> Tensor:
    """The reference, whose own test compares it with float64."""
    query, key, start, sinks = case.inputs()
    rest = (case.heads or case.key_heads, 0.3, case.softcap, sinks, case.group, case.round_to)
    return column_votes_reference(query, key, start, *rest)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name: str) -> None:
    case = CASES[name]
    votes = ours(case)
    assert votes.dtype == torch.float32
    slack = 1.0 if case.round_to is None else 2.0
    assert_close(name, votes, oracle(case), case.dtype if case.round_to is None else case.round_to, slack)


@pytest.mark.parametrize("name", ["later_chunk", "padded_rows", "learned_sinks", "one_slot"])
def test_spans_of_slots_do_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "LEAST_SPAN", 1)
    query, key, start, sinks = CASES[name].inputs()
    args = (start, key.shape[1], 0.3, None, sinks, "mean", None)
    spans = [step.grid[1] for step in launch.plan(query, key, *args)[1] if step.kernel.__name__ == "row_lse_kernel"]
    assert spans == [-(-key.shape[2] // launch.tiles(torch.float32, 64)[1])]
    assert_close(name, ours(CASES[name]), oracle(CASES[name]), torch.float32)


@pytest.mark.parametrize(
    "name", ["prefill_of_several_blocks", "later_chunk", "padded_prefill", "max", "bf16", "decode"]
)
def test_one_launch_where_the_log_sum_exp_is_given(name: str) -> None:
    case = CASES[name]
    query, key, start, sinks = case.inputs()
    softmax = (0.3, case.softcap, sinks)
    lse = row_logsumexp(query, key, start, *softmax).clone()
    lse[lse.isinf()] = torch.nan  # of queries that see nothing
    given = (query, key, start, case.heads or case.key_heads, *softmax, case.group, case.round_to, lse)
    assert [step.kernel.__name__ for step in launch.plan(*given)[1]] == ["col_scores_kernel"]
    assert_close(name, OP.backends[0].run(*given), oracle(case), case.dtype)


def test_the_same_every_time() -> None:
    case = CASES["padded_prefill"]
    assert torch.equal(ours(case), ours(case))


def test_triton_is_what_runs_here() -> None:
    query, key, _, _ = CASES["window"].inputs()
    assert OP.explain(Problem.of(query, key))[0] == "triton"


@pytest.mark.parametrize("far_apart", ["heads", "slots"])
def test_offsets_beyond_32_bits(far_apart: str) -> None:
    """Index times stride exceeds 2**31 although each fits; the memory between is reserved and never touched."""
    storage = torch.from_numpy(np.zeros(2**31 + 4096, dtype=np.float16)) if DEVICE == "cpu" else None
    if storage is None:
        storage = torch.zeros(2**31 + 4096, dtype=torch.float16, device=DEVICE)
    strides = (1, 2**30, 64, 1) if far_apart == "heads" else (1, 64, 2**30, 1)
    key = storage.as_strided((1, 3, 3, 64), strides)
    generator = torch.Generator().manual_seed(0)
    key.copy_(torch.randn(1, 3, 3, 64, generator=generator))
    query = torch.randn(1, 6, 2, 64, generator=generator).to(DEVICE, torch.float16)
    votes = column_votes(query, key, None, heads=3, scaling=0.3)
    expected = column_votes_reference(query, key.contiguous(), None, 3, 0.3, None, None, "mean", None)
    assert_close(far_apart, votes, expected, torch.float16)
