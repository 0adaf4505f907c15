"""VHR, PAINT and VAR: what the report says of them, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import llm_accel
from llm_accel import PAINT, VAR, VHR, ConfigError, UnsupportedCallError, VASparse
from llm_accel.methods import Grounding
from llm_accel.patches.rows import keep_rows
from tests.patches.calls import Outside
from tests.patches.vision.test_grounding import PAI, PAINT_ON, STEPS, VAR_ON, VHR_ON, every_method, spoken
from tests.tiny_vlm import IMAGE, ONE, UNEQUAL, Scene, inputs, tiny_vlm


def test_sinks_are_found_with_the_first_token() -> None:
    """A channel that is made to stand out in the middle layers is the one that VAR finds, and reports."""
    model = tiny_vlm()
    with torch.no_grad():
        model.get_decoder().embed_tokens.weight[1, 11] = 400.0
    with llm_accel.apply(model, VAR(tau=4.0)) as handle:
        assert handle.report().backends["sinks"] == ("dimensions 11", "found with the first token")
    with llm_accel.apply(tiny_vlm(), VAR()) as handle:
        assert handle.report().backends["sinks"][0].startswith("no dimension")


def test_the_report_says_what_was_scaled() -> None:
    model, batch = tiny_vlm(), inputs(tiny_vlm(), ONE)
    with llm_accel.apply(model, [VHR_ON, PAI]) as handle:
        spoken(model, batch)
        report = handle.report()
    visual = int((batch["input_ids"] == IMAGE).sum())
    for layer in report.layers:
        assert len(layer.grounding["scaled_heads"][0]) == 2  # of four heads those above the median
        assert layer.grounding["visual"] == [visual]
        assert 0 < layer.grounding["shifted"] <= layer.grounding["asked"] == STEPS * 4  # four heads
    assert "heads     2.0 per layer and row scaled, in 3 layers" in str(report)
    assert report.backends["vhr"] == ("layers 0-2", "outputs of heads are scaled")


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (VHR(alpha=4.0), "alpha=4 is beyond 3"),
        (PAINT(alpha=0.8), "beyond a weight of 0.7"),
        (PAINT(alpha=0.1, beta=0.9), "beyond a weight of 0.7"),
    ],
)
def test_known_cliffs_are_warned_about(method: Grounding, words: str) -> None:
    with llm_accel.apply(tiny_vlm(), method) as handle:
        assert [words in warning for warning in handle.report().warnings] == [True]
    with llm_accel.apply(tiny_vlm(), type(method)()) as handle:
        assert handle.report().warnings == []


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        ([PAI, "h2o"], "keeps as many entries in each head: snapkv"),
        ([VAR_ON, "adakv"], "keeps as many entries in each head: snapkv"),
        ([PAI, "hip"], "computes in another way|would"),
        ([PAI, VAR_ON], "both shift attention between entries"),
        ([VHR_ON, VHR()], "both scale the outputs of heads"),
        ([PAI, VASparse()], "vasparse computes in another way"),
        ([PAINT_ON, "downsample"], "shows another image"),
        ([VHR(layers=(1, 9))], "names layer 9, but the model has layers 0 to 2"),
        ([PAINT(first_layer=3)], "names layer 3"),
        ([VAR(first_layer=2)], "acts in no layer"),
        ([VAR(dims=(32,))], "dimension 32, but llama has 32 channels"),
    ],
)
def test_refused_at_apply(methods: list[Any], words: str) -> None:
    model = tiny_vlm()
    outside = Outside.of(model)
    with pytest.raises(ConfigError, match=words):
        llm_accel.apply(model, methods)
    assert Outside.of(model) == outside


@every_method
def test_refused_calls(method: Grounding) -> None:
    model = tiny_vlm()
    batch = inputs(model, ONE)
    with llm_accel.apply(model, method):
        with pytest.raises(UnsupportedCallError, match="use_cache=False"):
            spoken(model, batch, use_cache=False)
        with pytest.raises(UnsupportedCallError, match="prompt_lookup_num_tokens"):
            spoken(model, batch, prompt_lookup_num_tokens=2)
        with torch.no_grad():
            once = model(**batch, use_cache=False).logits
            assert torch.equal(model(**batch).logits, once)
            with pytest.raises(UnsupportedCallError, match="must know which tokens are visual"):
                model(inputs_embeds=torch.randn(1, 5, 32))


@every_method
def test_prompts_are_not_read_apart(method: Grounding) -> None:
    """What was decided about rows would be lost where caches are joined; nor may slots that leave move marks."""
    model = tiny_vlm()
    with llm_accel.apply(model, method) as handle:
        assert not handle.can_prefill
        with pytest.raises(UnsupportedCallError, match="cannot be divided among calls"):
            handle.prefill([torch.tensor([5, 6, 7]), torch.tensor([8, 9])])


@every_method
def test_rows_that_leave_take_their_padding_along(method: Grounding) -> None:
    model = tiny_vlm()
    batch, short = inputs(model, UNEQUAL), inputs(model, UNEQUAL[1:])
    token = torch.tensor([[7]])
    with llm_accel.apply(model, method) as handle, torch.no_grad():
        both, alone = handle.new_cache(), handle.new_cache()
        model(**batch, past_key_values=both)
        model(**short, past_key_values=alone)
        length = batch["input_ids"].shape[1]
        keep_rows(both, [1], length - short["input_ids"].shape[1])
        # the model had counted padding too
        left = model(input_ids=token, position_ids=torch.tensor([[length]]), past_key_values=both).logits
        assert torch.allclose(left, model(input_ids=token, past_key_values=alone).logits, atol=1e-4)


def test_vhr_needs_the_whole_prompt_and_a_question() -> None:
    model = tiny_vlm()
    batch, text = inputs(model, ONE), inputs(model, [Scene((9,))])
    with llm_accel.apply(model, VHR_ON) as handle, torch.no_grad():
        with pytest.raises(UnsupportedCallError, match="that token is one of the image"):
            spoken(model, inputs(model, [Scene((5, 0), 2)]))
        cache = handle.new_cache()
        model(**text, past_key_values=cache)
        with pytest.raises(UnsupportedCallError, match="show the image in the first turn"):
            model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"], past_key_values=cache)


def test_paint_must_have_seen_the_image() -> None:
    """Features that come from elsewhere carry no marks; a weight for all visual tokens needs none."""
    model = tiny_vlm()
    batch = inputs(model, ONE)
    features = model.base_model.get_image_features(batch["pixel_values"], return_dict=True).pooler_output
    merged = model.get_input_embeddings()(batch["input_ids"])
    with llm_accel.apply(model, PAINT_ON), pytest.raises(UnsupportedCallError, match="is known of 0"):
        model(inputs_embeds=merged, attention_mask=batch["attention_mask"])
    assert len(features)
