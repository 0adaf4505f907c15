"""Attention must be given what the cache holds: else it is refused at apply, or at the latest in the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb
from transformers.models.nemotron.modeling_nemotron import NemotronConfig, NemotronForCausalLM

import llm_accel
from llm_accel import AdaKV, EvictionError, RetrievalHeads, SnapKV, StreamingLLM, UnsupportedModelError
from llm_accel.methods import MethodConfig
from llm_accel.patches.cache_name import CACHE
from llm_accel.patches.wiring import wiring_of
from tests.contracts.oracle import masked, visible_columns
from tests.patches.calls import Outside, logits_of
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


def odd_model(twist: Callable[[Attend, Tensor, Tensor], Tensor], kv_heads: int = 2, **changes: Any) -> PreTrainedModel:
    """A tiny Llama with ``twist`` in its middle layer, and other attributes of that layer's attention."""
    model = tiny_model("llama", num_key_value_heads=kv_heads)
    attention = model.model.layers[1].self_attn
    attention.__class__, attention.twist = OddAttention, twist
    for name, value in changes.items():
        setattr(attention, name, value)
    return model


def repeated(states: Tensor) -> Tensor:
    return states.repeat_interleave(2, dim=1)


def alibi(attend: Attend, key: Tensor, value: Tensor) -> Tensor:
    return attend(key, value, torch.zeros(1, 1, 1, key.shape[2]))


def normalised(attend: Attend, key: Tensor, value: Tensor) -> Tensor:
    return attend(nn.functional.normalize(key, dim=-1) * 4, value.contiguous())


def interleaved(attend: Attend, key: Tensor, value: Tensor) -> Tensor:
    """Of four heads, the first and the last stay where they are."""
    return attend(key, value.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2))


def turned(attend: Attend, key: Tensor, value: Tensor) -> Tensor:
    """A rotary embedding after the cache, by places in it."""
    angle = torch.arange(key.shape[2])[:, None] * torch.logspace(0, -2, key.shape[-1] // 2)
    first, second = key.chunk(2, -1)
    return attend(
        torch.cat([first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()], -1), value
    )


def never(attend: Attend, key: Tensor, value: Tensor) -> Tensor:
    return repeated(value[:, :, -attend.length :]).transpose(1, 2)


def without_arguments(attend: Attend, key: Tensor, value: Tensor) -> Tensor:
    return attend(key, value, llm_accel=None)


UNWIRED: dict[str, tuple[Callable[[Attend, Tensor, Tensor], Tensor], str]] = {
    "values of other heads": (lambda attend, k, v: attend(k, v.roll(1, 1)), "layer 1 rearranges keys or values"),
    "heads tiled, not repeated": (lambda attend, k, v: attend(k.repeat(1, 2, 1, 1), repeated(v)), "layer 1 rearranges"),
    "another order of entries": (lambda attend, k, v: attend(k.flip(2), v.flip(2)), "layer 1 rearranges"),
    "sums over entries": (lambda attend, k, v: attend(k, v.cumsum(2)), "layer 1 rearranges"),
    "keys turned by their place": (turned, "what layer 1 makes of an entry of its cache depends on the place"),
    "both directions": (lambda attend, k, v: attend(k, v, is_causal=False), "layer 1 attends in both directions"),
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


def test_heads_in_another_order_are_noticed_whichever_they_are() -> None:
    with pytest.raises(UnsupportedModelError, match="layer 1 rearranges keys or values"):
        llm_accel.apply(odd_model(interleaved, kv_heads=4), KEEP)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (AdaKV(budget=16, window=4), "heads that keep different entries are read from their stores directly"),
        (RetrievalHeads(head_list=("0.0",)), r"layers \[1\] attend to what they compute from their entries"),
        (StreamingLLM(budget=16, positions="cache"), r"layers \[1\] keep latents or the like"),
    ],
    ids=["adakv", "retrieval_heads", "positions in the cache"],
)
def test_methods_that_read_their_store_themselves_are_refused_where_attention_is_given_something_else(
    config: MethodConfig, words: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        llm_accel.apply(odd_model(normalised), config)


@pytest.mark.parametrize(
    ("twist", "changes"),
    [
        (lambda attend, k, v: attend(k, v), {}),
        (lambda attend, k, v: attend(repeated(k), repeated(v)), {"num_key_value_groups": 1}),
        (normalised, {}),
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


def test_entries_that_are_left_out_later_are_noticed_where_attention_is_given_computed_ones() -> None:
    model = odd_model(normalised)
    with llm_accel.apply(model, KEEP):
        model.model.layers[1].self_attn.twist = lambda attend, k, v: attend(k[:, :, 1:], v[:, :, 1:])
        with pytest.raises(UnsupportedModelError, match=r"layer 1 \(OddAttention\) is not given the keys"):
            model(prompt(LENGTH))


def test_a_problem_is_not_remembered() -> None:
    model = odd_model(UNWIRED["values of other heads"][0])
    with pytest.raises(UnsupportedModelError):
        llm_accel.apply(model, KEEP)
    model.model.layers[1].self_attn.twist = lambda attend, k, v: attend(k, v)
    llm_accel.apply(model, KEEP).remove()


def test_another_model_with_the_same_configuration_notices_nothing_of_the_trial_call() -> None:
    model = tiny_model("llama")
    other = AutoModelForCausalLM.from_config(model.config).eval()
    assert other.model.config is model.model.config
    alone = logits_of(other)
    meanwhile: list[Tensor] = []
    with llm_accel.apply(other, KEEP):
        compressed = logits_of(other)
    hook = model.model.layers[0].register_forward_hook(lambda *_: meanwhile.append(logits_of(other)))
    llm_accel.apply(model, KEEP).remove()
    hook.remove()
    assert meanwhile and all(torch.equal(one, alone) for one in meanwhile)

    model, meanwhile = AutoModelForCausalLM.from_config(model.config).eval(), []
    hook = model.model.layers[0].register_forward_hook(lambda *_: meanwhile.append(logits_of(other)))
    with llm_accel.apply(other, KEEP), llm_accel.apply(model, KEEP):
        hook.remove()
    assert meanwhile and all(torch.equal(one, compressed) for one in meanwhile)


class MergingLinear(nn.Linear):
    """Adapters of some libraries add themselves to the weight when they are told that training is over."""

    merged = False

    def train(self, mode: bool = True) -> MergingLinear:
        self.merged = not mode
        return super().train(mode)


def test_the_trial_call_tells_no_module_that_training_is_over() -> None:
    model = tiny_model("llama")
    adapter = model.model.layers[1].mlp.up_proj
    adapter.__class__ = MergingLinear
    model.train()
    llm_accel.apply(model, KEEP).remove()
    assert adapter.training and not adapter.merged


def test_the_trial_call_leaves_rotary_embeddings_that_depend_on_earlier_calls_as_they_are() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny_model("llama", rope_parameters=rope, max_position_embeddings=32)
    with torch.no_grad():
        model(prompt(80))
        before = model(prompt(LENGTH)).logits
        llm_accel.apply(model, KEEP).remove()
        assert torch.equal(model(prompt(LENGTH)).logits, before)


def test_the_trial_call_compiles_nothing() -> None:
    model, graphs = tiny_model("llama"), []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    for layer in model.model.layers:
        layer.compile(backend=backend)
    llm_accel.apply(model, KEEP).remove()
    assert not graphs
    with torch.no_grad():
        model(prompt(LENGTH))
    assert graphs


def test_the_default_device_does_not_matter() -> None:
    model = tiny_model("llama")
    with torch.device("meta"):
        llm_accel.apply(model, KEEP).remove()


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
