"""Pages of a ragged layer are handed out rarely."""

from __future__ import annotations

import pytest
import torch

import llm_accel
from llm_accel.cache.ragged import RaggedLayer
from llm_accel.patches.cache_name import CACHE
from tests.tiny import prompt, tiny_model


def test_pages_are_reserved_for_all_heads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of different lengths fill their pages at different steps; the host waits for the device once per page."""
    reserved: list[int] = []
    reserve = RaggedLayer._reserve

    def counted(layer: RaggedLayer, count: int) -> None:
        reserved.append(layer.longest)
        reserve(layer, count)

    monkeypatch.setattr(RaggedLayer, "_reserve", counted)
    model = tiny_model("llama", num_hidden_layers=1)
    with llm_accel.apply(model, "adakv", budget=24, window=8) as handle, torch.no_grad():
        cache = handle.new_cache()
        token = model(prompt(70, 3), **{CACHE: cache}).logits[:, -1:].argmax(-1)
        page = cache.layers[0].page
        reserved.clear()
        for _ in range(4 * page):
            token = model(token, **{CACHE: cache}).logits[:, -1:].argmax(-1)
    assert len(reserved) <= 5
