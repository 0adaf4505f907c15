"""Models and methods that ``apply`` refuses before it touches anything."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import PreTrainedModel

import llm_accel
from llm_accel import (
    ConfigError,
    SnapKV,
    UnknownMethodError,
    UnsupportedCallError,
    UnsupportedModelError,
)
from tests.patches.calls import IDS, MASK, Outside, logits_of, snapkv
from tests.tiny import prompt, sliding_mistral, tiny_model

SMALL: dict[str, Any] = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BART: dict[str, Any] = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    **SMALL,
}


def flex_attention() -> PreTrainedModel:
    model = tiny_model("llama")
    model.config._attn_implementation_internal = "flex_attention"
    return model


MODELS: dict[str, tuple[Callable[[], object], str]] = {
    "number": (lambda: 5, "is a int; give the transformers model"),
    "nothing": (lambda: None, "NoneType"),
    "module": (lambda: torch.nn.Linear(1, 1), "is a Linear"),
    "t5": (
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0, **SMALL)
        ),
        "t5 is an encoder-decoder model",
    ),
    "bart": (lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART)), "bart is an encoder-decoder model"),
    "bert": (
        lambda: hf.BertModel(
            hf.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, **SMALL)
        ),
        "bert attends in both directions",
    ),
    "bloom": (
        lambda: hf.BloomForCausalLM(hf.BloomConfig(hidden_size=16, n_layer=1, n_head=2, **SMALL)),
        "bloom cannot be accelerated: .*attention of layer 0 does not go through transformers",
    ),
    "mamba": (
        lambda: hf.MambaForCausalLM(hf.MambaConfig(hidden_size=16, num_hidden_layers=1, **SMALL)),
        "mamba",
    ),
    "sliding_mistral": (
        lambda: hf.AutoModelForCausalLM.from_config(sliding_mistral()),
        "nothing to compress, none of the 3 layers.*sliding window of 16",
    ),
    "flex_attention": (flex_attention, "'flex_attention'; supported: eager, sdpa"),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    build, words = MODELS[name]
    model = build()
    before = Outside.of(model) if isinstance(model, PreTrainedModel) and name not in ("t5", "bart") else None
    with pytest.raises(UnsupportedModelError, match=words):
        llm_accel.apply(model, "snapkv")
    assert before is None or Outside.of(model) == before
    llm_accel.remove(model)


@pytest.mark.parametrize(
    ("method", "options", "kind", "words"),
    [
        ("snapkb", {}, UnknownMethodError, "'snapkb'. Did you mean 'snapkv'"),
        ("snapkv", {"bugdet": 3}, ConfigError, "'bugdet'. Did you mean 'budget'"),
        ("snapkv", {"skip_layers": (3,)}, ConfigError, "names layer 3; llama has layers 0 to 2"),
        ("snapkv", {"skip_layers": (2, 0, 1)}, ConfigError, "no layer to act on; llama has layers 0 to 2"),
        ("snapkv", {"skip_layers": 0}, ConfigError, "skip_layers=.*tuple"),
        (SnapKV(), {"budget": 3}, ConfigError, r"budget=3: 'snapkv' has options of its own.*SnapKV\(budget=3\)"),
        (
            ["snapkv", "random"],
            {"budget": 64},
            ConfigError,
            r"a single method; .* `SnapKV\(budget=64\)` or \"snap",
        ),
        ([SnapKV(), "hip"], {"stages": ((8, None, 2),)}, ConfigError, r"HiP\(.*or \"hip:stages=8:None:2\""),
        ("snapkv:budget=64", {"window": 4}, ConfigError, "'snapkv:budget=64' has options of its own"),
        (["snapkv:bugdet=64"], {}, ConfigError, "Did you mean 'budget'"),
        (["snapkv", "random"], {}, ConfigError, "snapkv and random both decide"),
        ([SnapKV(), SnapKV()], {}, ConfigError, "both decide"),
        ([], {}, ConfigError, "names no method"),
        (SnapKV, {}, ConfigError, "give a method name"),
        (None, {}, ConfigError, "method=None is a NoneType"),
        ({"snapkv": 1}, {}, ConfigError, "is a dict"),
    ],
)
def test_methods(model: PreTrainedModel, method: Any, options: dict[str, Any], kind: type, words: str) -> None:
    before = Outside.of(model)
    with pytest.raises(kind, match=words):
        llm_accel.apply(model, method, **options)
    assert Outside.of(model) == before


@pytest.mark.parametrize("kind", ["dynamic", "hybrid"])
def test_cache_kinds_that_mean_ours(model: PreTrainedModel, kind: str) -> None:
    snapkv(model)
    ours = logits_of(model)
    assert torch.equal(logits_of(model, cache_implementation=kind), ours)
    model.generation_config.cache_implementation = kind
    assert torch.equal(logits_of(model), ours)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("method", ["snapkv", "adakv", "streaming_llm"])
def test_a_cache_used_after_remove_is_refused_at_once(family: str, tokens: int, method: str) -> None:
    model = tiny_model(family)
    handle = llm_accel.apply(model, method, budget=40)
    cache = handle.new_cache()
    model(IDS, attention_mask=MASK, past_key_values=cache)
    untouched = copy.deepcopy(cache)
    handle.remove()
    for _ in range(2):
        with pytest.raises(UnsupportedCallError, match="runs without it; apply the same method again"):
            model(IDS[:, :tokens], past_key_values=cache)
    llm_accel.apply(model, method, budget=40)
    if family == "llama":  # nothing was stored before the refusal
        expected = model(IDS[:, :tokens], past_key_values=untouched).logits
        assert torch.equal(model(IDS[:, :tokens], past_key_values=cache).logits, expected)
    else:  # a sliding layer comes first and has stored what was refused
        with pytest.raises(UnsupportedCallError, match="start with a new cache"):
            model(IDS[:, :tokens], past_key_values=cache)


def test_skip_layers_and_sliding_ones_together_must_leave_a_layer() -> None:
    model = tiny_model("gemma3")
    before = Outside.of(model)
    with pytest.raises(ConfigError, match=r"skip_layers=\(1,\) leaves no layer.*sliding window"):
        snapkv(model, skip_layers=(1,))
    assert Outside.of(model) == before


def test_gemma3_with_image_blocks_is_refused() -> None:
    text = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    text |= {"head_dim": 8, "intermediate_size": 16, "layer_types": ["full_attention", "sliding_attention"]}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = hf.Gemma3Config(
        text_config=text | SMALL,
        vision_config=vision | {"image_size": 8, "patch_size": 4},
        mm_tokens_per_image=4,
        image_token_index=9,
    )
    model = hf.Gemma3ForConditionalGeneration(config).eval()
    ids = prompt(40) % 8 + 10
    dense, before = model(ids).logits, Outside.of(model)
    with pytest.raises(UnsupportedModelError, match="gemma3 builds the masks of its decoder itself"):
        snapkv(model)
    assert Outside.of(model) == before
    assert torch.equal(model(ids).logits, dense)
