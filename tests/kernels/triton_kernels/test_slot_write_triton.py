"""Slot write on Triton, bit by bit."""

from __future__ import annotations

import pytest
import torch

from llm_accel.kernels.dispatch import Problem
from llm_accel.kernels.slot_write import OP
from tests.kernels.slot_write_case import CASES
from tests.kernels.triton_device import DEVICE


@pytest.mark.parametrize("name", CASES)
def test_writes_one_entry_per_head(name: str) -> None:
    CASES[name].check(DEVICE)


def test_triton_is_what_runs_here() -> None:
    assert OP.explain(Problem(torch.device(DEVICE), torch.float64, 512))[0] == "triton"
