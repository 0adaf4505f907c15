"""The counter of the benchmark finds decoder and tower, and counts what a hand does."""

from __future__ import annotations

import torch

from benchmarks.vision_ttft import BUDGET, TEXT, VISUAL, build_model, counted, make_prompt


def test_counted_operations_of_the_decoder_equal_those_by_hand():
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 3}
    model = build_model(small, small)
    with torch.inference_mode():
        dense, ours = (counted(model, make_prompt(), budget) for budget in (None, BUDGET))
    weights = 4 * 32 * 32 + 3 * 32 * 48
    for found, rows in ((dense, VISUAL + TEXT), (ours, BUDGET + TEXT)):
        assert found["decoder"] == 3 * (2 * rows * weights + 4 * rows**2 * 32)
    assert dense["tower"] > ours["tower"] > 0 and dense["all"] > dense["decoder"] + dense["tower"]
