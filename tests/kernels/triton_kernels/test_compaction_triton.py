"""Cache compaction on Triton, bit by bit."""

from __future__ import annotations

import pytest
import torch

from llm_accel.kernels.compaction import OP, gather_entries
from llm_accel.kernels.dispatch import Problem
from tests.kernels.compaction_case import CASES, expected, same_bits
from tests.kernels.triton_device import DEVICE


@pytest.mark.parametrize("name", CASES)
def test_copies_the_chosen_entries(name: str) -> None:
    case = CASES[name]
    copies = gather_entries(*case.inputs(DEVICE))
    for ours, right in zip(copies, expected(case), strict=False):
        assert ours is not None and ours.is_contiguous()
        assert same_bits(ours.cpu()[:, :, case.padded :], right[:, :, case.padded :])


def test_triton_is_what_runs_here() -> None:
    assert OP.explain(Problem(torch.device(DEVICE), torch.float64, 512))[0] == "triton"
