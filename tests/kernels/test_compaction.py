"""Cache compaction, bit by bit."""

from __future__ import annotations

import pytest
import torch

from llm_accel.kernels.compaction import gather_entries
from tests.kernels.compaction_case import CASES, expected, same_bits


@pytest.mark.parametrize("name", CASES)
def test_copies_the_chosen_entries(name: str) -> None:
    case = CASES[name]
    indices, keys, values, scores = case.inputs()
    copies = gather_entries(indices, keys, values, scores)
    assert (copies[2] is None) == (scores is None)
    for ours, right in zip(copies, expected(case), strict=False):
        assert ours is not None and same_bits(ours[:, :, case.padded :], right[:, :, case.padded :])


def test_the_copies_keep_nothing_alive() -> None:
    indices, keys, values, _ = CASES["everything"].inputs()
    for copy in gather_entries(indices, keys, values)[:2]:
        assert copy.is_contiguous()
        assert copy.untyped_storage().nbytes() == copy.nbytes


def test_scores_of_another_dtype_than_the_entries() -> None:
    indices, keys, values, scores = CASES["bfloat16"].inputs()
    assert scores is not None
    copied = gather_entries(indices, keys, values, scores)[2]
    assert copied is not None and copied.dtype == torch.float32
