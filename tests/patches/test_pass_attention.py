"""Attention of a pass in pieces: the output is that of attention as a whole, its log-sum-exp that of the logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llm_accel
from llm_accel import KVzip
from llm_accel.methods import PassView
from llm_accel.patches.base_attention import ModelAttention
from llm_accel.patches.pass_attention import attend_in_pieces
from tests.tiny import tiny_model

CONTEXT, COUNT, SCALING = 37, 11, 0.6
SEEN = {
    "whole": [slice(0, CONTEXT)],
    "from the start": [slice(0, 20)],
    "with sinks": [slice(0, 4), slice(15, 30)],
    "to the end": [slice(0, 4), slice(30, CONTEXT)],
    "in the middle": [slice(9, 21)],
}


def attention(groups: int, **kwargs: Any) -> ModelAttention:
    """SDPA as transformers calls it."""
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = groups, True  # type: ignore[assignment]
    return ModelAttention("sdpa", module, {"scaling": SCALING, "dropout": 0.0, **kwargs})


def drawn(heads: int, key_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(heads)
    query = torch.randn(2, heads, COUNT, 16, generator=generator)
    key, value = (torch.randn(2, key_heads, CONTEXT + COUNT, 16, generator=generator) for _ in range(2))
    return query, key, value


@pytest.mark.parametrize("seen", SEEN.values(), ids=SEEN)
@pytest.mark.parametrize("heads, key_heads", [(4, 4), (6, 2)])
def test_pieces_are_the_whole(heads: int, key_heads: int, seen: list[slice]) -> None:
    query, key, value = drawn(heads, key_heads)
    found = attend_in_pieces(attention(heads // key_heads), query, key, value, seen)
    assert found is not None
    whole = attention(heads // key_heads).dense(query, key, value, None)
    torch.testing.assert_close(found[0], whole, atol=2e-6, rtol=1e-5)
    logits = torch.matmul(query.double(), key.double().repeat_interleave(heads // key_heads, 1).mT) * SCALING
    visible = torch.zeros(COUNT, CONTEXT + COUNT, dtype=torch.bool)
    for piece in seen:
        visible[:, piece] = True
    visible[:, CONTEXT:] = torch.ones(COUNT, COUNT, dtype=torch.bool).tril()
    written_out = logits.masked_fill(~visible, float("-inf")).logsumexp(-1)
    torch.testing.assert_close(found[1].double(), written_out, atol=1e-5, rtol=1e-5)


def test_attention_without_a_log_sum_exp_is_left_to_others() -> None:
    query, key, value = drawn(4, 4)
    bias = torch.zeros(1, 4, COUNT, CONTEXT + COUNT)
    assert attend_in_pieces(attention(1, position_bias=bias), query, key, value, SEEN["whole"]) is None
    eager = ModelAttention("eager", attention(1).module, {"scaling": SCALING})
    assert attend_in_pieces(eager, query, key, value, SEEN["whole"]) is None
    narrow = value[..., :8]  # keys and values of different sizes have no fused kernel on a CPU
    assert attend_in_pieces(attention(1), query, key, narrow, SEEN["whole"]) is None


@pytest.mark.parametrize("chunk", [2048, 24])
def test_sdpa_gives_what_the_score_takes(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model("llama"), torch.randint(5, 100, (2, 60), generator=torch.Generator().manual_seed(1))
    views: list[PassView] = []
    score = KVzip.pass_score
    monkeypatch.setattr(KVzip, "pass_score", lambda self, view: (views.append(view), score(self, view))[1])
    with llm_accel.apply(model, "kvzip", budget=20, chunk=chunk):
        model.generate(ids, max_new_tokens=1, do_sample=False)
    assert views and all(view.lse is not None for view in views)
    for view in views:
        alone = score(KVzip(), replace(view, lse=None))
        torch.testing.assert_close(score(KVzip(), view), alone, atol=1e-6, rtol=1e-4)
