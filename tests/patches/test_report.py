"""Report and trace: what they say before, during and after calls, and that they keep no cache alive."""

from __future__ import annotations

import copy
import gc
import json
import weakref

import pytest
import torch
from transformers import PreTrainedModel

from llm_accel import UnsupportedModelError
from tests.patches.calls import BUDGET, IDS, MASK, NEW, logits_of, snapkv
from tests.tiny import prompt, tiny_model


def test_before_any_call(model: PreTrainedModel) -> None:
    report = snapkv(model).report()
    assert report.layers == []
    assert report.kv_bytes == report.dense_kv_bytes == 0
    assert "no call yet" in str(report)
    assert report.backends["attention"][0] == "sdpa"
    assert report.backends["scores"][0] == "torch"
    json.dumps(report.to_dict())


def test_numbers_of_a_generate_call(model: PreTrainedModel) -> None:
    handle = snapkv(model)
    logits_of(model)
    report, heads, dim = handle.report(), model.config.num_key_value_heads, model.config.head_dim
    entry = 2 * heads * dim * 4 * IDS.shape[0]
    assert [layer.layer for layer in report.layers] == [0, 1, 2]
    for layer in report.layers:
        assert layer.logical_length == IDS.shape[1] + NEW - 1
        assert layer.physical_length == BUDGET + NEW - 1
        assert layer.evicted == IDS.shape[1] - BUDGET
        assert layer.kv_bytes == entry * layer.physical_length
        assert layer.dense_kv_bytes == entry * layer.logical_length
        assert layer.kept is None
    assert report.kv_bytes == 3 * report.layers[0].kv_bytes
    assert report.warnings == []
    assert f"{BUDGET + NEW - 1} stored of {IDS.shape[1] + NEW - 1} seen, in 3 of 3 layers" in str(report)
    assert report.method == "snapkv:budget=24,window=8"


def test_follows_the_cache_while_it_lives(model: PreTrainedModel) -> None:
    handle = snapkv(model)
    cache = handle.new_cache()
    for given, logical, physical in ((IDS, 60, BUDGET), (IDS[:, :1], 61, BUDGET + 1), (IDS[:, :5], 66, BUDGET + 6)):
        model(given, past_key_values=cache)
        layer = handle.report().layers[2]
        assert (layer.logical_length, layer.physical_length) == (logical, physical)


def test_no_cache_outlives_its_call(model: PreTrainedModel) -> None:
    handle = snapkv(model, trace=True)
    output = model.generate(IDS, attention_mask=MASK, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
    layer = output.past_key_values.layers[0]
    watched = [weakref.ref(thing) for thing in (layer.keys, layer.values, output.past_key_values)]
    before = handle.report()
    del layer
    gc.disable()
    try:
        del output
        assert all(reference() is None for reference in watched)
    finally:
        gc.enable()
    after = handle.report()
    assert after.layers[1].physical_length == before.layers[1].physical_length == BUDGET + NEW - 1
    assert torch.equal(after.layers[1].kept, before.layers[1].kept)


def test_a_short_prompt_says_that_nothing_was_evicted(model: PreTrainedModel) -> None:
    handle = snapkv(model, trace=True)
    logits_of(model, prompt(10), None)
    report = handle.report()
    assert all(layer.evicted == 0 and layer.kept is None for layer in report.layers)
    assert report.kv_bytes == report.dense_kv_bytes
    assert "fits into the budget" in report.warnings[0]


def test_skipped_layers_are_named(model: PreTrainedModel) -> None:
    handle = snapkv(model, skip_layers=(0, 2))
    logits_of(model)
    layers = handle.report().layers
    assert [layer.skipped_reason for layer in layers] == ["named in skip_layers", None, "named in skip_layers"]
    assert [layer.evicted for layer in layers] == [0, IDS.shape[1] - BUDGET, 0]
    assert layers[0].physical_length == layers[0].logical_length == layers[1].logical_length
    assert "layers 0, 2: named in skip_layers" in str(handle.report())


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gpt_oss"])
def test_sliding_layers_are_named_and_strict_refuses_them(family: str) -> None:
    model = tiny_model(family)
    handle = snapkv(model)
    logits_of(model)
    reasons = {layer.layer: layer.skipped_reason for layer in handle.report().layers if layer.skipped_reason}
    assert list(reasons) == [0, 2]
    assert all("sliding window of 16 tokens" in reason for reason in reasons.values())
    handle.remove()
    with pytest.raises(UnsupportedModelError, match=r"strict=True: layers \[0, 2\]"):
        snapkv(model, strict=True)


def test_strict_accepts_a_model_whose_layers_are_all_compressed(model: PreTrainedModel) -> None:
    handle = snapkv(model, strict=True, skip_layers=(1,))
    logits_of(model)
    assert [layer.evicted > 0 for layer in handle.report().layers] == [True, False, True]


def test_trace_counts_from_the_first_real_token(model: PreTrainedModel) -> None:
    handle, mask = snapkv(model, trace=True), MASK.clone()
    mask[1, :50] = 0
    logits_of(model, mask=mask)
    for layer in handle.report().layers:
        kept = layer.kept
        assert kept.dtype == torch.int64
        assert kept.shape == (2, model.config.num_key_value_heads, BUDGET)
        assert (kept[0] >= 0).all()
        assert torch.equal(kept[0, :, -8:], torch.arange(52, 60).expand(2, -1))
        assert torch.equal(kept[1], torch.cat([torch.full((14,), -1), torch.arange(10)]).expand(2, -1))
        assert (kept[0].diff(dim=-1) > 0).all()
    plain = handle.report().to_dict()["layers"][0]["kept"]
    assert plain[1][0][:15] == [-1] * 14 + [0]


def test_trace_through_a_latent_cache() -> None:
    model = tiny_model("deepseek_v3")
    handle = snapkv(model, trace=True)
    logits_of(model)
    layer = handle.report().layers[1]
    assert layer.kept.shape == (2, 1, BUDGET)
    assert layer.physical_length == BUDGET + NEW - 1


def test_trace_after_recompression_counts_in_the_whole_conversation(model: PreTrainedModel) -> None:
    handle = snapkv(model, trace=True, multi_turn="recompress")
    cache = handle.new_cache()
    model(IDS, attention_mask=MASK, past_key_values=cache)
    first = handle.report().layers[0].kept
    model(prompt(20, batch=2), past_key_values=cache)
    second = handle.report().layers[0].kept
    assert second.shape == first.shape
    assert torch.equal(second[0, :, -8:], torch.arange(72, 80).expand(2, -1))
    assert torch.equal(second[1, :, -8:], torch.arange(53, 61).expand(2, -1))
    for row in range(2):
        for old, new in zip(first[row].tolist(), second[row].tolist(), strict=True):
            assert set(new) <= set(old) | set(range(IDS.shape[1] - 19 * row, 80))


def test_a_copied_or_saved_model_starts_without_a_report(model: PreTrainedModel) -> None:
    handle = snapkv(model)
    logits_of(model)
    twin = copy.deepcopy(model)
    assert twin.generate.hook.layer_reports() == []
    logits_of(twin, prompt(30), None)
    assert handle.report().layers[0].logical_length == IDS.shape[1] + NEW - 1
