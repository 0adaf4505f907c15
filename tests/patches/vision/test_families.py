"""Every family: dropping visual tokens at the decoder's entrance equals taking the rows out by hand."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from transformers import PreTrainedModel

import llm_accel
from llm_accel import StrideTokens
from tests.patches.calls import Outside
from tests.tiny_vlm import FAMILIES, IMAGE, ONE, UNEQUAL, Scene, decode, inputs, require_mode, tiny_vlm
from tests.vision_oracle import hidden, removed

EXACT = 2e-4
every_family = pytest.mark.parametrize("family", FAMILIES)


@cache
def model_of(family: str) -> PreTrainedModel:
    return tiny_vlm(family)


def dropped_by(model: PreTrainedModel, batch: dict[str, torch.Tensor], method: object) -> torch.Tensor:
    """Which tokens of a single row the method drops, bool [T], read from the features alone."""
    names = ("pixel_values", "image_sizes", "image_grid_thw")
    with llm_accel.apply(model, method):
        features = model.base_model.get_image_features(
            **{name: batch[name] for name in names if name in batch}, return_dict=True
        ).pooler_output
    dropped = torch.zeros(batch["input_ids"].shape[1], dtype=torch.bool)
    dropped[batch["input_ids"][0] == IMAGE] = torch.cat(list(features))[:, -1].isnan()
    return dropped


@every_family
def test_rows_equal_the_reference(family: str) -> None:
    model, method = model_of(family), StrideTokens(target=3)
    with llm_accel.apply(model, method) as handle:
        _, logits = decode(model, inputs(model, UNEQUAL))
        report = handle.report()
    before = after = 0
    for row, scene in enumerate(UNEQUAL):
        alone = inputs(model, [scene])
        dropped = dropped_by(model, alone, method)
        visual = alone["input_ids"][0] == IMAGE
        before, after = before + int(visual.sum()), after + int((visual & ~dropped).sum())
        assert 0 < int(dropped.sum()) < int(visual.sum())
        reference = removed(model, copy.deepcopy(alone), dropped)
        assert torch.allclose(logits[row], reference, atol=EXACT), (logits[row] - reference).abs().max()
        assert torch.allclose(reference, hidden(model, alone, dropped, behind=-1), atol=EXACT)
    assert (report.visual_tokens_before, report.visual_tokens_after) == (before, after)


@every_family
def test_nothing_to_drop_and_exact_undo(family: str) -> None:
    model = tiny_vlm(family)
    batch = inputs(model, UNEQUAL)
    dense = decode(model, batch)
    outside = Outside.of(model)
    with llm_accel.apply(model, "stride_tokens", target=500):
        same = decode(model, batch)
    assert torch.equal(dense[1], same[1])
    with llm_accel.apply(model, "stride_tokens", keep_ratio=0.3) as handle:
        assert not torch.equal(dense[1], decode(model, batch)[1])
        with handle.disabled():
            assert torch.equal(dense[1], decode(model, batch)[1])
        assert torch.equal(dense[1], decode(tiny_vlm(family), batch)[1])
    assert torch.equal(dense[1], decode(model, batch)[1])
    assert Outside.of(model) == outside
    assert "get_image_features" not in vars(model.base_model)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
@pytest.mark.parametrize("mode", ["uncached", "beams", "chunks", "eager"])
def test_modes(family: str, mode: str) -> None:
    model = tiny_vlm(family, attention="eager") if mode == "eager" else model_of(family)
    batch = inputs(model, ONE)
    beams = {"num_beams": 3}
    if mode == "beams":
        require_mode(model, batch, beams, beams | {"use_cache": False})
    if mode == "chunks":
        require_mode(model, batch, {"prefill_chunk_size": 11}, {})
    with llm_accel.apply(model, "stride_tokens", keep_ratio=0.5):
        if mode == "beams":
            options = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
            got, wanted = (model.generate(**batch, **options, use_cache=cache) for cache in (True, False))
            assert torch.equal(got, wanted)
            return
        changes = {"uncached": {"use_cache": False}, "chunks": {"prefill_chunk_size": 11}, "eager": {}}[mode]
        got = decode(model, batch, **changes)
    with llm_accel.apply(model_of(family), "stride_tokens", keep_ratio=0.5):
        wanted = decode(model_of(family), batch)
    assert torch.equal(got[0], wanted[0])
    assert torch.allclose(got[1], wanted[1], atol=EXACT)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_text_alone_passes_through_and_nothing_is_remembered(family: str) -> None:
    model = model_of(family)
    text, one, two = inputs(model, [Scene((12,))]), inputs(model, ONE), inputs(model, [Scene((3, 2, 4), 8)])
    dense = decode(model, text)
    with llm_accel.apply(model, "random_tokens", target=4) as handle:
        assert torch.equal(decode(model, text)[1], dense[1])
        assert "the prompt has none" in " ".join(handle.report().warnings)
        first = decode(model, one)
        decode(model, two)
        assert torch.equal(decode(model, one)[1], first[1])
