"""The probe sees what attention sees and changes nothing."""

from __future__ import annotations

import pytest
import torch

import llm_accel
from llm_accel.patches.probe import Observed, observe_attention
from tests.patches.calls import Outside, logits_of, snapkv
from tests.tiny import FAMILIES, prompt, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_watching_changes_nothing_and_leaves_nothing(family: str) -> None:
    model = tiny_model(family)
    before, dense = Outside.of(model), logits_of(model)
    seen: list[Observed] = []
    with observe_attention(model, seen.append):
        assert torch.equal(logits_of(model), dense)
    assert Outside.of(model) == before
    assert {one.layer for one in seen} == set(range(model.config.num_hidden_layers))
    assert torch.equal(logits_of(model), dense)


@torch.no_grad()
def test_queries_and_keys_give_the_attention_of_the_model() -> None:
    model, ids = tiny_model("llama"), prompt(20)
    seen: dict[int, Observed] = {}
    with observe_attention(model, lambda one: seen.update({one.layer: one})):
        model(ids)
    model.set_attn_implementation("eager")
    expected = model(ids, output_attentions=True).attentions
    future = torch.ones(20, 20, dtype=torch.bool).triu(1)
    for layer, one in seen.items():
        logits = one.query @ one.key.repeat_interleave(2, 1).transpose(2, 3) * one.scaling
        assert (logits.masked_fill(future, float("-inf")).softmax(-1) - expected[layer]).abs().max() < 1e-5


def test_other_models_are_not_watched() -> None:
    model, other = tiny_model("llama"), tiny_model("llama", seed=3)
    seen: list[Observed] = []
    with observe_attention(model, seen.append):
        logits_of(other)
    assert not seen


def test_undone_after_an_error() -> None:
    model = tiny_model("llama")
    before = Outside.of(model)

    def fail(seen: Observed) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), observe_attention(model, fail):
        model(prompt(4))
    assert Outside.of(model) == before


def test_an_accelerated_model_is_refused() -> None:
    model = tiny_model("llama")
    snapkv(model)
    with pytest.raises(llm_accel.AlreadyAppliedError, match="remove"), observe_attention(model, print):
        pass
