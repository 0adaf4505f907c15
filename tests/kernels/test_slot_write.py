"""Slot write in plain torch: entry by entry, and with gradients."""

from __future__ import annotations

import pytest
import torch

from llm_accel.kernels.slot_write import slot_write
from tests.kernels.slot_write_case import CASES


@pytest.mark.parametrize("name", CASES)
def test_writes_one_entry_per_head(name: str) -> None:
    CASES[name].check()


def test_what_is_written_keeps_its_gradient() -> None:
    given = CASES["plain"].inputs()
    new = given["new_key"].requires_grad_()
    slot_write(**given)
    given["keys"].sum().backward()
    assert torch.equal(new.grad, torch.ones_like(new))
