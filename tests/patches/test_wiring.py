"""Attention must be given what the cache holds: else it is refused at apply, or at the latest in the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb
from transformers.models.nemotron.modeling_nemotron import NemotronConfig, NemotronForCausalLM

import llm_accel
from llm_accel import EvictionError, SnapKV, UnsupportedModelError
from llm_accel.patches.cache_name import CACHE
from llm_accel.patches.wiring import wiring_of
from tests.contracts.oracle import masked, visible_columns
from tests.patches.calls import Outside
from tests.tiny import prompt, tiny_model

Attend = Callable[..., Tensor]
LENGTH, NEW = 48, 5
KEEP = SnapKV(budget=16, window=4)


class OddAttention(LlamaAttention):
    """Llama's attention with something else between cache and attention."""

    def forward(
        self, hidden_states: Tensor, position_embeddings: Any, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        parts = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (part(hidden_states).view(shape).transpose(1, 2) for part in parts)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        cache = kwargs.pop(CACHE, None)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)

        def attend(key: Tensor, value: Tensor, mask: Any = attention_mask, **more: Any) -> Tensor:
            given = {"scaling": self.scaling} | kwargs | more
            return attention_of(self)(self, query, key, value, mask, **given)[0]

        attend.length = query.shape[2]
        output = self.twist(attend, key, value).reshape(*hidden_states.shape[:-1], -1)
        return self.o_proj(output.contiguous()), None


def attention_of(module: LlamaAttention) -> Callable[..., Any]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation]


def odd_model(twist: Callable[[Attend, Tensor, Tensor], Tensor], **changes: Any) -> PreTrainedModel:
    """A tiny Llama with ``twist`` in its middle layer, and other attributes of that layer's attention."""
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    attention.__class__, attention.twist = OddAttention, twist
    for name, value in changes.items():
        setattr(attention, name, value)
    return model


def repeated(states: Tensor) -> Tensor:
    return states.repeat_interleave(2, dim=1)


def alibi(attend: Attend, key: Tensor, value: Tensor) -> Tensor:
    return attend(key, value, torch.zeros(1, 1, 1, key.shape[2]))


def never(attend: Attend, key: Tensor, value: Tensor) -> Tensor:
    return repeated(value[:, :, -attend.length :]).transpose(1, 2)


def without_arguments(attend: Attend, key: Tensor, value: Tensor) -> Tensor:
    return attend(key, value, llm_accel=None)


UNWIRED: dict[str, tuple[Callable[[Attend, Tensor, Tensor], Tensor], str]] = {
    "values of other heads": (lambda attend, k, v: attend(k, v.roll(1, 1)), "layer 1 rearranges keys or values"),
    "heads tiled, not repeated": (lambda attend, k, v: attend(k.repeat(1, 2, 1, 1), repeated(v)), "layer 1 rearranges"),
    "another order of entries": (lambda attend, k, v: attend(k.flip(2), v.flip(2)), "layer 1 rearranges"),
    "sums over entries": (lambda attend, k, v: attend(k, v.cumsum(2)), "layer 1 rearranges"),
    "attends twice": (lambda attend, k, v: attend(k, v) - attend(k, v), "layer 1 computes attention more than once"),
    "a mask of its own": (alibi, "layer 1 adds something of its own to the causal mask"),
    "a bias for positions": (
        lambda attend, k, v: attend(k, v, position_bias=torch.zeros(1)),
        "layer 1 adds a bias for each position",
    ),
    "attention of its own": (never, "attention of layer 1 does not go through transformers' AttentionInterface"),
    "no keyword arguments": (without_arguments, "OddAttention calls attention without the keyword arguments"),
}


@pytest.mark.parametrize("name", UNWIRED)
def test_what_cannot_be_followed_is_refused_at_apply(name: str) -> None:
    twist, words = UNWIRED[name]
    model = odd_model(twist)
    before = Outside.of(model)
    with pytest.raises(UnsupportedModelError, match=words):
        llm_accel.apply(model, KEEP)
    assert Outside.of(model) == before


@pytest.mark.parametrize(
    ("twist", "changes"),
    [
        (lambda attend, k, v: attend(k, v), {}),
        (lambda attend, k, v: attend(repeated(k), repeated(v)), {"num_key_value_groups": 1}),
        (lambda attend, k, v: attend(nn.functional.normalize(k, dim=-1) * 4, v.contiguous()), {}),
    ],
    ids=["as it is", "repeated for the query heads", "normalised after the cache"],
)
def test_what_is_computed_entry_by_entry_is_right(
    twist: Callable[[Attend, Tensor, Tensor], Tensor], changes: dict[str, Any]
) -> None:
    model, ids = odd_model(twist, **changes), prompt(LENGTH)
    options = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with llm_accel.apply(model, KEEP, trace=True) as handle:
        ours = torch.stack(model.generate(ids, **options).logits)
        layers = handle.report().layers
    assert all(layer.evicted for layer in layers)
    visible = {layer.layer: visible_columns(layer.kept, LENGTH, (LENGTH,)) for layer in layers}
    with masked(model, visible):
        torch.testing.assert_close(ours, torch.stack(model.generate(ids, **options).logits), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("values of other heads", UnsupportedModelError, "layer 1 .OddAttention. is not given the keys"),
        ("another order of entries", UnsupportedModelError, "layer 1 .OddAttention. is not given the keys"),
        ("attends twice", UnsupportedModelError, "layer 1 .OddAttention. is not given the keys"),
        ("a mask of its own", UnsupportedModelError, "layer 1 .OddAttention. adds a mask of its own"),
        ("attention of its own", EvictionError, "attention of layer 1 never reached llm_accel"),
    ],
)
def test_what_changes_after_apply_is_noticed_in_the_call(name: str, error: type[Exception], words: str) -> None:
    model = odd_model(lambda attend, k, v: attend(k, v))
    with llm_accel.apply(model, KEEP):
        model.model.layers[1].self_attn.twist = UNWIRED[name][0]
        with pytest.raises(error, match=words):
            model(prompt(LENGTH))


def test_the_trial_call_leaves_no_trace() -> None:
    model = tiny_model("qwen3_moe").train()
    model.model.layers[0].eval()
    before, state = Outside.of(model), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    assert wiring_of(model.get_decoder()).problem is None
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert Outside.of(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_decoder_is_tried_once() -> None:
    model, calls = tiny_model("llama"), []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        llm_accel.apply(model, KEEP).remove()
    assert len(calls) == 2  # a prompt and a decode step


def test_layers_that_hand_no_keyword_arguments_down_are_named() -> None:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32, "head_dim": 8}
    model = NemotronForCausalLM(NemotronConfig(num_attention_heads=2, num_key_value_heads=1, **small)).eval()
    with pytest.raises(UnsupportedModelError, match="NemotronAttention calls attention without the keyword arguments"):
        llm_accel.apply(model, KEEP)
