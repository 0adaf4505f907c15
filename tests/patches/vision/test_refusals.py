"""What cannot work with visual methods is said before anything is touched, or in the call itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf

import llm_accel
from llm_accel import (
    ConfigError,
    DyVTE,
    FastV,
    FlowCut,
    RandomTokens,
    SnapKV,
    StreamingLLM,
    StrideTokens,
    UnsupportedCallError,
    UnsupportedModelError,
)
from llm_accel.patches.vision.tombstones import buried, tombstones
from tests.patches.calls import Outside
from tests.tiny import tiny_model
from tests.tiny_vlm import CLIP, IMAGE, ONE, TEXT, decode, inputs, tiny_vlm

VISION = {name: CLIP[name] for name in CLIP if name != "projection_dim"}


def test_llava_with_a_tower_without_class_token_is_refused():
    vision = hf.SiglipVisionConfig(**VISION)
    model = hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(text_config=hf.LlamaConfig(**TEXT), vision_config=vision, image_token_index=IMAGE)
    )
    with pytest.raises(UnsupportedModelError, match="a siglip_vision_model, which has none"):
        llm_accel.apply(model, "flowcut", budget=2)
    llm_accel.apply(model, SnapKV(budget=40)).remove()


def gemma3() -> Any:
    text = hf.Gemma3TextConfig(**TEXT, layer_types=["full_attention"] * 3)
    vision = hf.SiglipVisionConfig(**VISION)
    return hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(text_config=text, vision_config=vision, image_token_id=IMAGE, mm_tokens_per_image=4)
    )


def paligemma() -> Any:
    return hf.PaliGemmaForConditionalGeneration(
        hf.PaliGemmaConfig(
            text_config=hf.GemmaConfig(**TEXT), vision_config=hf.SiglipVisionConfig(**VISION), image_token_id=IMAGE
        )
    )


def mllama() -> Any:
    text = hf.models.mllama.MllamaTextConfig(**TEXT, cross_attention_layers=[1])
    vision = hf.models.mllama.MllamaVisionConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_global_layers=1,
        attention_heads=2,
        intermediate_size=32,
        vision_output_dim=64,
        image_size=28,
        patch_size=7,
        intermediate_layers_indices=[0],
        max_num_tiles=1,
        supported_aspect_ratios=[[1, 1]],
    )
    return hf.MllamaForConditionalGeneration(
        hf.MllamaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    )


def blip2() -> Any:
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return hf.Blip2ForConditionalGeneration(
        hf.Blip2Config(
            vision_config={**small, "image_size": 28, "patch_size": 14},
            qformer_config={**small, "encoder_hidden_size": 32, "vocab_size": 64},
            text_config=hf.OPTConfig(
                hidden_size=32, num_hidden_layers=1, ffn_dim=32, num_attention_heads=2, vocab_size=128
            ),
            num_query_tokens=4,
            image_token_id=IMAGE,
        )
    )


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (gemma3, "gemma3: its image tokens attend to each other in both directions.*Supported: llava"),
        (paligemma, "paligemma attends in both directions"),
        (mllama, "mllama: its image is no part of the token sequence"),
        (blip2, "blip-2: a Q-Former hands on"),
        (lambda: tiny_model("llama"), "llama: it sees no images"),
        (lambda: tiny_vlm().get_decoder(), "llama: it sees no images"),
    ],
)
@pytest.mark.parametrize("method", ["flowcut", "dyvte"])
def test_models(build: Any, words: str, method: str) -> None:
    model = build()
    outside = Outside.of(model)
    with pytest.raises(UnsupportedModelError, match=words):
        llm_accel.apply(model, method)
    assert Outside.of(model) == outside


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        ([FlowCut(), RandomTokens()], "flowcut and random_tokens both decide"),
        ([DyVTE(), FastV()], "dyvte and fastv both let"),
        ([DyVTE(exit=3)], "layers 0 to 2"),
        ([StrideTokens(), StreamingLLM(budget=20, positions="cache")], "new positions"),
    ],
)
def test_methods(methods: list[Any], words: str) -> None:
    model = tiny_vlm()
    outside = Outside.of(model)
    with pytest.raises(ConfigError, match=words):
        llm_accel.apply(model, methods)
    assert Outside.of(model) == outside


def test_features_that_come_later_than_the_cut() -> None:
    model = tiny_vlm("qwen3_vl")
    with pytest.raises(ConfigError, match="adds features to them up to layer 1"):
        llm_accel.apply(model, "dyvte", exit=0)


def test_labels_and_wrong_numbers_of_images() -> None:
    model = tiny_vlm("llava_onevision")
    batch = inputs(model, ONE)
    with llm_accel.apply(model, "stride_tokens", budget=3) as handle:
        with pytest.raises(UnsupportedCallError, match="labels have one entry per token"):
            model(**batch, labels=batch["input_ids"])
        fewer = batch | {"input_ids": batch["input_ids"][:, 5:], "attention_mask": batch["attention_mask"][:, 5:]}
        with pytest.raises(ValueError, match="do not match"):
            model.generate(**fewer, max_new_tokens=2)
        with handle.disabled():
            assert model(**batch, labels=batch["input_ids"]).loss.isfinite()


def test_sliding_layers_and_assisted_decoding() -> None:
    sliding = tiny_vlm("llava_next")
    sliding.config.text_config.sliding_window = 16
    sliding.config.text_config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    with pytest.raises(UnsupportedModelError, match=r"layers \[1\] of llava_next keep caches of their own"):
        llm_accel.apply(sliding, "dyvte")
    model = tiny_vlm()
    with llm_accel.apply(model, "dyvte"), pytest.raises(UnsupportedCallError, match="assisted decoding"):
        model.generate(**inputs(model, ONE), prompt_lookup_num_tokens=2)


def test_protected_tokens() -> None:
    model = tiny_vlm()
    batch = inputs(model, ONE)
    with (
        llm_accel.apply(model, [StrideTokens(budget=3), SnapKV(budget=20, window=4)]),
        pytest.raises(UnsupportedCallError, match="protect_mask counts the tokens of the prompt"),
    ):
        model.generate(**batch, protect_mask=torch.ones_like(batch["input_ids"]).bool())


def test_without_the_decoder_hook_the_call_fails_in_plain_sight() -> None:
    model = tiny_vlm()
    batch = inputs(model, ONE)
    llm_accel.apply(model, "stride_tokens", budget=3)
    proxy = model.base_model.get_image_features
    llm_accel.remove(model)
    model.base_model.get_image_features, proxy.hook.enabled = proxy, True
    assert not model(**batch, use_cache=False).logits.isfinite().any(-1)[:, -1].any()


def test_a_feature_that_is_not_a_number_is_no_tombstone() -> None:
    features = torch.randn(4, 6)
    features[1], features[2, 0] = float("nan"), float("inf")
    marked = buried(features, torch.tensor([True, True, True, False]))
    for kind in (torch.float32, torch.bfloat16, torch.float16):
        assert tombstones(marked.to(kind)[None])[0].tolist() == [False, False, False, True]


def test_copies_of_a_patched_model_work_alone() -> None:
    model = tiny_vlm()
    batch = inputs(model, ONE)
    dense = decode(model, batch)[1]
    with llm_accel.apply(model, [FlowCut(budget=4), DyVTE(exit=1)]):
        ours = decode(model, batch)[1]
        twin = copy.deepcopy(model)
    assert torch.equal(decode(model, batch)[1], dense)
    assert torch.equal(decode(twin, batch)[1], ours)
    llm_accel.remove(twin)
    assert torch.equal(decode(twin, batch)[1], dense)


def test_taken_off_the_decoder_alone_and_put_on_again() -> None:
    model = tiny_vlm()
    batch = inputs(model, ONE)
    dense, outside = decode(model, batch)[1], Outside.of(model)
    with llm_accel.apply(model, [FlowCut(budget=4), DyVTE(exit=1)]):
        ours = decode(model, batch)[1]
        llm_accel.remove(model.get_decoder())
        assert torch.equal(decode(model, batch)[1], dense)
    with llm_accel.apply(model, [FlowCut(budget=4), DyVTE(exit=1)]):
        assert torch.equal(decode(model, batch)[1], ours)
    assert torch.equal(decode(model, batch)[1], dense)
    assert Outside.of(model) == outside


def test_another_attention_in_the_tower_is_noticed() -> None:
    model = tiny_vlm()
    with llm_accel.apply(model, "flowcut", budget=4):
        model.set_attn_implementation({"vision_config": "eager"})
        with pytest.raises(UnsupportedCallError, match="layer 0 of the vision tower never reached llm_accel"):
            decode(model, inputs(model, ONE))


def test_a_later_turn_that_would_leave_gaps() -> None:
    """One row gets an image and the other as many words: the first would end up with a hole before them."""
    model = tiny_vlm()
    batch = inputs(model, ONE)
    words = torch.randint(3, 100, batch["input_ids"].shape)
    with llm_accel.apply(model, "stride_tokens", budget=3) as handle:
        cache = handle.new_cache()
        model(torch.randint(3, 100, (2, 7)), past_key_values=cache)
        with pytest.raises(UnsupportedCallError, match="would leave gaps"):
            model(torch.cat([batch["input_ids"], words]), pixel_values=batch["pixel_values"], past_key_values=cache)
        cache = handle.new_cache()
        model(torch.randint(3, 100, (1, 7)), past_key_values=cache)
        with_image = model(batch["input_ids"], pixel_values=batch["pixel_values"], past_key_values=cache).logits
        assert with_image.isfinite().all() and cache.get_seq_length() == 7 + batch["input_ids"].shape[1]
