"""Pair probabilities against a float64 softmax."""

from __future__ import annotations

import pytest
import torch

from llm_accel.kernels.column_votes import reference
from llm_accel.kernels.pair_probabilities import pair_probabilities


def oracle(
    query: torch.Tensor, key: torch.Tensor, columns: torch.Tensor, softcap: float | None, sinks: torch.Tensor | None
) -> torch.Tensor:
    keys = key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = query.double() @ keys.transpose(2, 3) * 0.3
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    rows, slots = query.shape[2], key.shape[2]
    hidden = torch.arange(slots)[None] > torch.arange(slots - rows, slots)[:, None]
    logits = logits.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        column = sinks.double()[None, :, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, column], -1)
    wanted = columns.clamp(min=0).expand(*logits.shape[:2], -1, -1)
    return logits.softmax(-1).gather(3, wanted).masked_fill(columns < 0, 0.0)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(("rows", "slots", "group"), [(1, 1, 1), (7, 7, 2), (5, 23, 4), (150, 301, 2)])
def test_equals_the_float64_softmax(
    monkeypatch: pytest.MonkeyPatch, rows: int, slots: int, group: int, learned: bool, softcap: float | None
) -> None:
    monkeypatch.setattr(reference, "KEY_BLOCK", 64)
    torch.manual_seed(rows)
    query, key = torch.randn(2, 3 * group, rows, 8) * 2, torch.randn(2, 3, slots, 8)
    columns = torch.randint(-1, slots, (rows, 4))
    sinks = torch.randn(3 * group) if learned else None
    ours = pair_probabilities(query, key, columns, scaling=0.3, softcap=softcap, sinks=sinks)
    assert ours.dtype == torch.float32
    assert (ours - oracle(query, key, columns, softcap, sinks)).abs().max() < 1e-5


def test_all_columns_of_a_row_sum_to_one() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    total = pair_probabilities(query, key, torch.arange(6).expand(6, 6), scaling=1.0).sum(-1)
    assert torch.allclose(total, torch.ones_like(total))
