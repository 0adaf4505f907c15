"""Slot decode on Triton: output and scores against float64, the victim against a loop over the same scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llm_accel.kernels import splits
from llm_accel.kernels.dispatch import Problem
from llm_accel.kernels.slot_decode import OP, launch, slot_decode
from llm_accel.kernels.slot_decode.reference import slot_decode_reference
from tests.kernels.slot_case import CASES, Case
from tests.kernels.triton_device import DEVICE, assert_close

WIDE = {
    "several_blocks": Case(slots=200, batch=2, start=(0, 130), group=4, dim=64),
    "group_of_seven": Case(group=7, dim=64),
    "group_of_several_tiles": Case(kv_heads=1, group=71, slots=20),
    "dim_80": Case(dim=80, softcap=5.0),
    "dim_96_value_48": Case(dim=96, width=48),
    "dim_128": Case(dim=128, per_query=True),
    "dim_256": Case(dim=256, with_sinks=True),
    "fp16": Case(slots=130, dim=64, dtype=torch.float16, with_sinks=True, decay=0.9),
    "bf16": Case(slots=130, dim=128, dtype=torch.bfloat16, softcap=20.0, batch=2, start=(3, 70)),
    "bf16_group_of_sixteen": Case(kv_heads=1, group=16, dim=64, dtype=torch.bfloat16),
}
ALL = {name: case for name, case in (CASES | WIDE).items() if case.dtype != torch.float64}


def check(name: str, case: Case) -> None:
    output, scores, victims = (part.cpu() for part in case.ours(DEVICE))
    expected, expected_scores = case.oracle()
    assert output.dtype == case.dtype and scores.dtype == torch.float32
    # the interpreter cuts bf16 results off instead of rounding them
    assert_close(name, output, expected, case.dtype, slack=2.0 if case.dtype == torch.bfloat16 else 1.0)
    assert_close(name, scores, expected_scores, torch.float32)
    assert victims.tolist() == case.victims(scores)


@pytest.mark.parametrize("name", ALL)
def test_equals_float64(name: str) -> None:
    check(name, ALL[name])


@pytest.mark.parametrize("name", ["padded", "row_without_entries", "learned_sinks", "several_blocks"])
def test_splits_and_blocks_do_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "LEAST_SHARE", 8)
    monkeypatch.setattr(launch, "SCORE_BLOCK", 16)
    given = ALL[name].inputs(DEVICE)
    sinks = given.pop("sinks")
    steps = launch.plan(*given.values(), 0.3, None, sinks, 1.0, 2, 9, False)[1]
    assert steps[0].grid[1] > 1
    check(name, ALL[name])


@pytest.mark.parametrize("name", ["ties", "ties_padded"])
def test_equals_of_several_blocks_keep_their_order(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "SCORE_BLOCK", 16)
    check(name, ALL[name])


def test_arguments_stay_as_they_are() -> None:
    given = ALL["padded"].inputs(DEVICE)
    before = {name: part.clone() for name, part in given.items() if part is not None}
    slot_decode(**given, scaling=0.3, decay=0.5)
    assert all(torch.equal(given[name], part) for name, part in before.items())


@pytest.mark.parametrize("far_apart", ["heads", "slots"])
def test_offsets_beyond_32_bits(far_apart: str) -> None:
    """Index times stride exceeds 2**31 although each fits; the memory between is reserved and never touched."""
    if DEVICE == "cpu":
        storage = torch.from_numpy(np.zeros(2**31 + 4096, dtype=np.float16))
    else:
        storage = torch.zeros(2**31 + 4096, dtype=torch.float16, device=DEVICE)
    far = storage.as_strided((1, 3, 3, 64), (1, 2**30, 64, 1) if far_apart == "heads" else (1, 64, 2**30, 1))
    case = Case(kv_heads=3, slots=3, dim=64, dtype=torch.float16, keep_recent=1)
    given = case.inputs(DEVICE)
    for name in ("key", "value"):
        ours = case.ours(DEVICE, **{name: far.copy_(given[name])})
        expected = slot_decode_reference(*list(given.values())[:6], 0.3, None, None, 1.0, 2, 1, False)
        assert_close(name, ours[0], expected[0], torch.float16)
        assert_close(name, ours[1], expected[1], torch.float32)


def test_triton_is_what_runs_here() -> None:
    assert OP.explain(Problem(torch.device(DEVICE), torch.float16, 64, 4))[0] == "triton"
