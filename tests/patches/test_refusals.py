"""What cannot work says so: the right class, a message that helps, and a model that still works afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache, QuantizedCache, StaticCache

from llm_accel import ConfigError, Handle, UnsupportedCallError
from tests.patches.calls import IDS, MASK, Outside, logits_of, snapkv
from tests.tiny import prompt, tiny_model

Call = Callable[[PreTrainedModel, Handle], object]
ROW = IDS[:1]
PAIRS = ((torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16)),) * 3


def generate(**options: Any) -> Call:
    return lambda model, handle: model.generate(ROW, max_new_tokens=3, **options)


def forward(ids: torch.Tensor = IDS, **options: Any) -> Call:
    return lambda model, handle: model(ids, **options)


def quantized(model: PreTrainedModel) -> QuantizedCache:
    """Its construction wants a quantisation library, which the refusal does not."""
    cache = QuantizedCache.__new__(QuantizedCache)
    Cache.__init__(cache, layer_class_to_replicate=DynamicLayer)
    return cache


def with_generation_config(**settings: Any) -> Call:
    def call(model: PreTrainedModel, handle: Handle) -> object:
        return model.generate(ROW, GenerationConfig(max_new_tokens=3, **settings))

    return call


def with_own_generation_config(**settings: Any) -> Call:
    def call(model: PreTrainedModel, handle: Handle) -> object:
        model.generation_config.update(**settings)
        try:
            return model.generate(ROW, generation_config=GenerationConfig(max_new_tokens=3))
        finally:
            model.generation_config.update(**dict.fromkeys(settings))

    return call


def with_output_attentions_in_the_config(model: PreTrainedModel, handle: Handle) -> object:
    model.config._output_attentions = True
    try:
        return model(ROW)
    finally:
        model.config._output_attentions = False


def later_turn(mask_of_the_turn: list[list[int]], with_history: bool) -> Call:
    def call(model: PreTrainedModel, handle: Handle) -> object:
        cache, mask = handle.new_cache(), torch.tensor(mask_of_the_turn)
        model(IDS, attention_mask=MASK, past_key_values=cache)
        mask = torch.cat([MASK, mask], dim=1) if with_history else mask
        return model(prompt(3, batch=2), attention_mask=mask, past_key_values=cache)

    return call


def filled_before(model: PreTrainedModel, handle: Handle) -> object:
    cache = DynamicCache(config=model.config)
    with handle.disabled():
        model(IDS, past_key_values=cache)
    return model(IDS[:, :1], past_key_values=cache)


def of_another_plan(model: PreTrainedModel, handle: Handle) -> object:
    with snapkv(tiny_model("llama"), budget=30) as other:
        return model(IDS, past_key_values=other.new_cache())


def ours_while_disabled(model: PreTrainedModel, handle: Handle) -> object:
    with handle.disabled():
        return model(IDS, past_key_values=handle.new_cache())


def changed_implementation(model: PreTrainedModel, handle: Handle) -> object:
    name = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return model(IDS)
    finally:
        model.config._attn_implementation_internal = name


CALLS: dict[str, tuple[Call, str]] = {
    "assistant_model": (generate(assistant_model=tiny_model("llama", seed=3)), "assistant_model.*disabled"),
    "prompt_lookup": (generate(prompt_lookup_num_tokens=3), "prompt_lookup_num_tokens.*rolls the cache back"),
    "early_exit": (generate(assistant_early_exit=1), "assistant_early_exit"),
    "multi_token_prediction": (generate(use_mtp=True), "use_mtp"),
    "prompt_lookup_by_config": (with_generation_config(prompt_lookup_num_tokens=3), "prompt_lookup_num_tokens"),
    "prompt_lookup_by_default": (with_own_generation_config(prompt_lookup_num_tokens=3), "prompt_lookup_num_tokens"),
    **{
        f"implementation_{kind}": (generate(cache_implementation=kind), f"cache_implementation='{kind}'.*'dynamic'")
        for kind in ("static", "offloaded_static", "offloaded", "quantized", "paged", "nonsense")
    },
    "static_by_default": (with_own_generation_config(cache_implementation="static"), "cache_implementation='static'"),
    "static_cache": (lambda m, h: m(ROW, past_key_values=StaticCache(m.config, max_cache_len=80)), "StaticCache"),
    "static_cache_generate": (
        lambda m, h: m.generate(ROW, past_key_values=StaticCache(m.config, max_cache_len=80)),
        "StaticCache.*new_cache",
    ),
    "quantized_cache": (lambda m, h: m(ROW, past_key_values=quantized(m)), "QuantizedCache"),
    "offloading_cache": (
        lambda m, h: m(ROW, past_key_values=DynamicCache(config=m.config, offloading=True)),
        "offloaded DynamicCache",
    ),
    "encoder_decoder_cache": (
        lambda m, h: m(ROW, past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache())),
        "EncoderDecoderCache",
    ),
    "legacy_tuple": (forward(ROW, past_key_values=PAIRS), "is a tuple.*new_cache"),
    "legacy_tuple_generate": (generate(past_key_values=PAIRS), "is a tuple"),
    "output_attentions": (forward(output_attentions=True), "output_attentions.*disabled"),
    "output_attentions_generate": (generate(output_attentions=True), "output_attentions"),
    "output_attentions_config": (with_output_attentions_in_the_config, "output_attentions"),
    "mask_4d": (forward(attention_mask=torch.zeros(2, 1, 60, 60)), r"\(2, 1, 60, 60\).*2-D mask"),
    "mask_3d": (forward(attention_mask=torch.ones(2, 60, 60)), "2-D mask"),
    "mask_dict": (forward(attention_mask={"full_attention": None}), "is dict.*2-D mask"),
    "right_padding": (forward(IDS.flip(1), attention_mask=MASK.flip(1)), "pad on the left"),
    "right_padding_generate": (
        lambda m, h: m.generate(IDS.flip(1), attention_mask=MASK.flip(1), max_new_tokens=2),
        "padding_side = 'left'",
    ),
    "gap_before_a_later_turn": (later_turn([[1, 1, 1], [0, 1, 1]], with_history=True), "no gaps between turns"),
    "padded_later_turn": (later_turn([[1, 1, 1], [0, 1, 1]], with_history=False), "later turn"),
    "filled_before_apply": (filled_before, "filled before llm_accel.apply"),
    "cache_of_another_plan": (of_another_plan, "snapkv:budget=30,window=8, the model now runs snapkv:budget=24"),
    "our_cache_while_disabled": (ours_while_disabled, "inside disabled"),
    "implementation_changed_after_apply": (changed_implementation, "'eager' after llm_accel.apply.*remove"),
    "generate_batch": (lambda m, h: m.generate_batch([[1, 2]]), "generate_batch.*continuous batching"),
    "init_continuous_batching": (lambda m, h: m.init_continuous_batching(), "left-padded batch"),
    "continuous_batching_context_manager": (lambda m, h: m.continuous_batching_context_manager(), "remove"),
}
PROTECT: dict[str, tuple[object, str]] = {
    "too_many": (torch.ones_like(IDS, dtype=torch.bool), "marks 60 tokens of row 0.*keeps 24.*8 are taken"),
    "too_long": (torch.zeros(2, 61, dtype=torch.bool), "covers 61 tokens, the prompt has 60"),
    "wrong_batch": (torch.zeros(3, 60, dtype=torch.bool), "3 rows, the batch 2"),
    "one_row": (torch.zeros(60, dtype=torch.bool), r"\(60,\); give a bool tensor"),
    "list": ([[True] * 60] * 2, "is list; give a bool tensor"),
}


@pytest.fixture
def handle(model: PreTrainedModel) -> Iterator[Handle]:
    """A plugged-in model that must give the same after the test and be a stock model once unplugged."""
    stock, handle = Outside.of(model), snapkv(model)
    before, ours = Outside.of(model), logits_of(model)
    yield handle
    assert Outside.of(model) == before
    assert torch.equal(logits_of(model), ours)
    handle.remove()
    assert Outside.of(model) == stock


@pytest.mark.parametrize("name", CALLS)
def test_calls(model: PreTrainedModel, handle: Handle, name: str) -> None:
    call, words = CALLS[name]
    with pytest.raises(UnsupportedCallError, match=words):
        call(model, handle)


@pytest.mark.parametrize("name", PROTECT)
def test_protection(model: PreTrainedModel, handle: Handle, name: str) -> None:
    mask, words = PROTECT[name]
    with pytest.raises(ConfigError, match=words):
        model.generate(IDS, max_new_tokens=2, protect_mask=mask)
