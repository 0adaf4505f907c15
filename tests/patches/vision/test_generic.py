"""Families that are not declared: what needs no vision tower works on those that are built alike, and the report says
that nobody has tested them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import PreTrainedModel

import llm_accel
from llm_accel import FastV, RandomTokens, SnapKV, UnsupportedCallError, UnsupportedModelError
from tests.patches.calls import Outside
from tests.tiny_vlm import CLIP, IMAGE, TEXT, decode, widened
from tests.vision_oracle import hidden, removed

SIGLIP = {name: CLIP[name] for name in CLIP if name != "projection_dim"}
EXACT = 2e-4


def build(config: Any, kind: type[Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    return widened(kind(config))


def aya_vision() -> PreTrainedModel:
    config = hf.AyaVisionConfig(
        vision_config=hf.SiglipVisionConfig(**SIGLIP),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        downsample_factor=2,
        adapter_layer_norm_eps=1e-6,
    )
    return build(config, hf.AyaVisionForConditionalGeneration)


def mistral3() -> PreTrainedModel:
    vision = hf.PixtralVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7
    )
    config = hf.Mistral3Config(
        vision_config=vision,
        text_config=hf.MistralConfig(**TEXT, sliding_window=None),
        image_token_id=IMAGE,
        spatial_merge_size=2,
    )
    return build(config, hf.Mistral3ForConditionalGeneration)


def cohere2_vision() -> PreTrainedModel:
    config = hf.Cohere2VisionConfig(
        vision_config=hf.SiglipVisionConfig(**SIGLIP),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        downsample_factor=2,
        alignment_intermediate_size=64,
    )
    return build(config, hf.Cohere2VisionForConditionalGeneration)


def scene(model: PreTrainedModel) -> dict[str, Any]:
    """One prompt with one image."""
    image: dict[str, Any] = {"pixel_values": torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(5))}
    if model.config.model_type == "mistral3":
        image["image_sizes"] = torch.tensor([[28, 28]])
    with torch.no_grad():
        count = sum(map(len, model.base_model.get_image_features(**image, return_dict=True).pooler_output))
    ids = torch.tensor([[5, 6, 7, *[IMAGE] * count, 8, 9, 10, 11]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **image}


BUILT = pytest.mark.parametrize("make", [aya_vision, mistral3, cohere2_vision])


@BUILT
def test_dropping_rows_equals_taking_them_out_by_hand(make: Callable[[], PreTrainedModel]) -> None:
    model = make()
    batch, outside = scene(model), Outside.of(model)
    dense = decode(model, batch)
    with llm_accel.apply(model, RandomTokens(keep_ratio=0.5)) as handle:
        _, logits = decode(model, batch)
        report = handle.report()
        image = {name: batch[name] for name in batch if name not in ("input_ids", "attention_mask")}
        rows = torch.cat(list(model.base_model.get_image_features(**image, return_dict=True).pooler_output))
    dropped = torch.zeros(batch["input_ids"].shape[1], dtype=torch.bool)
    dropped[batch["input_ids"][0] == IMAGE] = rows[:, -1].isnan()
    assert 0 < int(dropped.sum()) < len(rows)
    reference = removed(model, copy.deepcopy(batch), dropped)
    assert torch.allclose(logits[0], reference, atol=EXACT)
    assert report.backends["visual tokens"][0] == "generic" and "not among the tested" in str(report)
    assert report.visual_tokens_after == len(rows) - int(dropped.sum())
    assert Outside.of(model) == outside and torch.equal(decode(model, batch)[1], dense[1])


@BUILT
def test_a_cut_between_layers_equals_hidden_keys(make: Callable[[], PreTrainedModel]) -> None:
    model = make()
    batch = scene(model)
    with llm_accel.apply(model, "dyvte", exit=1):
        _, logits = decode(model, batch)
    reference = hidden(model, batch, batch["input_ids"][0] == IMAGE, behind=1)
    assert torch.allclose(logits[0], reference, atol=EXACT)


@BUILT
def test_beside_a_kv_method(make: Callable[[], PreTrainedModel]) -> None:
    model = make()
    batch = scene(model)
    with llm_accel.apply(model, [FastV(layer=1, keep_ratio=0.5), SnapKV(budget=6, window=2)]) as handle:
        decode(model, batch)
        assert max(layer.physical_length for layer in handle.report().layers) <= 6 + 5


def test_methods_that_look_into_the_tower_are_refused() -> None:
    model = aya_vision()
    outside = Outside.of(model)
    for method in ("flowcut", "visionzip", "downsample"):
        with pytest.raises(UnsupportedModelError, match="must know the vision tower, and aya_vision is not among"):
            llm_accel.apply(model, method)
    assert Outside.of(model) == outside


def test_features_in_one_piece_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = aya_vision()
    batch, original = scene(model), type(model.base_model).get_image_features

    @functools.wraps(original)
    def joined(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        output.pooler_output = torch.cat(list(output.pooler_output))
        return output

    monkeypatch.setattr(type(model.base_model), "get_image_features", joined)
    with llm_accel.apply(model, "stride_tokens", target=2), pytest.raises(UnsupportedCallError, match="in one piece"):
        decode(model, batch)
