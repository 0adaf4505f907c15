"""The laws that hold for every method, however its layers store their entries, and the calls that they rest on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

import llm_accel
from llm_accel.methods import MethodConfig
from tests.contracts.matrix import Batch, generate, make_batch
from tests.patches.calls import Outside
from tests.tiny import prompt, tiny_model

EXACT = 1e-5


def check_nothing_to_cut(model: PreTrainedModel, batch: Batch, config: MethodConfig) -> None:
    """A method that has nothing to evict changes no bit."""
    tokens, logits = generate(model, batch)
    with llm_accel.apply(model, config) as handle:
        ours, our_logits = generate(model, batch)
        assert not any(layer.evicted for layer in handle.report().layers)
    assert torch.equal(ours, tokens)
    assert torch.equal(our_logits, logits)


def check_undo(family: str, batch: Batch, config: MethodConfig) -> None:
    """Removing is exact, and a second model in the process never notices."""
    model, bystander = tiny_model(family), tiny_model(family)
    outside, before = Outside.of(model), generate(model, batch)
    handle = llm_accel.apply(model, config)
    assert torch.equal(generate(bystander, batch)[1], before[1])
    assert not torch.equal(generate(model, batch)[1], before[1])
    handle.remove()
    assert Outside.of(model) == outside
    after = generate(model, batch)
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1])


def check_no_memory(model: PreTrainedModel, shape: str, config: MethodConfig) -> None:
    """A prompt gives the same before and after another one."""
    first, other = make_batch(shape, long=True), make_batch(shape, long=False)
    with llm_accel.apply(model, config):
        once = generate(model, first)
        generate(model, other)
        twice = generate(model, first)
    assert torch.equal(once[0], twice[0])
    assert torch.equal(once[1], twice[1])


def check_copied_cache(config: MethodConfig) -> None:
    """A compressed context answers several questions, each on a copy of its cache."""
    model, batch = tiny_model("llama"), make_batch("single", long=True)
    with torch.no_grad(), llm_accel.apply(model, config) as handle:
        cache = handle.new_cache()
        model(batch.ids, past_key_values=cache)
        questions = [prompt(5, seed=seed) for seed in (11, 12)]
        answers = [model(question, past_key_values=copy.deepcopy(cache)).logits for question in questions]
        again = model(questions[0], past_key_values=cache).logits
    assert torch.equal(answers[0], again)
    assert not torch.equal(answers[0], answers[1])


def check_going_past_raises(config: MethodConfig) -> None:
    """A layer whose attention loses the session is found in the call itself."""
    model, batch = tiny_model("llama"), make_batch("single", long=True)
    attention = model.model.layers[1].self_attn
    forward = attention.forward

    def around(*args: object, **kwargs: object) -> object:
        kwargs.pop("llm_accel", None)
        return forward(*args, **kwargs)

    with llm_accel.apply(model, config):
        attention.forward = around
        with pytest.raises(llm_accel.EvictionError, match="layer 1"):
            generate(model, batch)


def searched(model: PreTrainedModel, batch: Batch, mode: dict[str, Any]) -> torch.Tensor:
    """Sequences of beam search or sampling, the same for the same logits."""
    torch.manual_seed(5)
    options = {"max_new_tokens": 8, "do_sample": False} | mode
    return model.generate(batch.ids, attention_mask=batch.mask, **options)


def two_turns(model: PreTrainedModel, batch: Batch, cache: DynamicCache, full_ids: bool) -> tuple[torch.Tensor, ...]:
    """A second question on the same cache, given with the whole conversation or with the new tokens only."""
    rows = batch.ids.shape[0]
    mask = torch.ones_like(batch.ids) if batch.mask is None else batch.mask
    first, logits = generate(model, batch, past_key_values=cache)
    question = prompt(9, seed=7, batch=rows)
    history = torch.cat([batch.ids, first, question], dim=1)
    history_mask = torch.cat([mask, torch.ones(rows, first.shape[1] + 9, dtype=mask.dtype)], dim=1)
    given = history if full_ids else history[:, cache.get_seq_length() :]
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    output = model.generate(given, attention_mask=history_mask, past_key_values=cache, **options)
    return logits, torch.stack(output.logits, dim=1)
