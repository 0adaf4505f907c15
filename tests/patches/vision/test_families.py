"""Every family: dropping visual tokens at the decoder's entrance equals taking the rows out by hand."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from transformers import PreTrainedModel

import llm_accel
from llm_accel import Downsample, FlowCut, StrideTokens, VisionZip, list_methods
from tests.patches.calls import Outside
from tests.tiny_vlm import (
    FAMILIES,
    IMAGE,
    ONE,
    UNEQUAL,
    VIDEO,
    VIDEOS,
    Scene,
    decode,
    family_for,
    features,
    inputs,
    require_mode,
    tiny_vlm,
)
from tests.vision_oracle import hidden, removed

EXACT = 2e-4
every_family = pytest.mark.parametrize("family", FAMILIES)


@cache
def model_of(family: str) -> PreTrainedModel:
    return tiny_vlm(family)


def dropped_by(model: PreTrainedModel, batch: dict[str, torch.Tensor], method: object) -> torch.Tensor:
    """Which tokens of a single row the method drops, bool [T], read from the features alone."""
    given = {name: batch[name] for name in batch if name.startswith(("pixel_", "image_", "video_"))}
    with llm_accel.apply(model, method):
        rows = features(model, given)
    dropped = torch.zeros(batch["input_ids"].shape[1], dtype=torch.bool)
    dropped[torch.isin(batch["input_ids"][0], torch.tensor([IMAGE, VIDEO]))] = rows[:, -1].isnan()
    return dropped


@pytest.mark.parametrize(
    ("family", "video"), [(family, False) for family in FAMILIES] + [(family, True) for family in VIDEOS]
)
def test_rows_equal_the_reference(family: str, video: bool) -> None:
    model, method = model_of(family), StrideTokens(budget=3)
    with llm_accel.apply(model, method) as handle:
        _, logits = decode(model, inputs(model, UNEQUAL, video))
        report = handle.report()
    before = after = 0
    for row, scene in enumerate(UNEQUAL):
        alone = inputs(model, [scene], video)
        dropped = dropped_by(model, alone, method)
        visual = alone["input_ids"][0] == (VIDEO if video else IMAGE)
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
    with llm_accel.apply(model, "stride_tokens", budget=500):
        same = decode(model, batch)
    assert torch.equal(dense[1], same[1])
    with llm_accel.apply(model, "stride_tokens", ratio=0.3) as handle:
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
    with llm_accel.apply(model, "stride_tokens", ratio=0.5):
        if mode == "beams":
            options = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
            got, wanted = (model.generate(**batch, **options, use_cache=cache) for cache in (True, False))
            assert torch.equal(got, wanted)
            return
        changes = {"uncached": {"use_cache": False}, "chunks": {"prefill_chunk_size": 11}, "eager": {}}[mode]
        longer = {"max_new_tokens": 12} if mode == "uncached" else {}
        got = decode(model, batch, **changes, **longer)
    with llm_accel.apply(model_of(family), "stride_tokens", ratio=0.5):
        wanted = decode(model_of(family), batch, **longer)
    assert torch.equal(got[0], wanted[0])
    assert torch.allclose(got[1], wanted[1], atol=EXACT)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_text_alone_passes_through_and_nothing_is_remembered(family: str) -> None:
    model = model_of(family)
    text, one, two = inputs(model, [Scene((12,))]), inputs(model, ONE), inputs(model, [Scene((3, 2, 4), 8)])
    dense = decode(model, text)
    with llm_accel.apply(model, "random_tokens", budget=4) as handle:
        assert torch.equal(decode(model, text)[1], dense[1])
        assert "the prompt has none" in " ".join(handle.report().warnings)
        first = decode(model, one)
        decode(model, two)
        assert torch.equal(decode(model, one)[1], first[1])


@pytest.mark.parametrize("name", [name for name, kind in list_methods().items() if kind.info.kinds == ("vision",)])
def test_text_alone_passes_through_every_method(name: str) -> None:
    model = model_of(family_for(name))
    text = inputs(model, [Scene((12,)), Scene((5,))])
    dense = decode(model, text)[1]
    with llm_accel.apply(model, name):
        assert torch.equal(decode(model, text)[1], dense)


@pytest.mark.parametrize("method", [FlowCut(budget=4, llm_stage="on"), VisionZip(budget=4), Downsample(budget=4)])
def test_the_decoder_sees_no_tombstone(method: object) -> None:
    """Every layer's input is finite, and hidden states of a call are those of the rows that are left."""
    model = tiny_vlm()
    inputs_of: list[torch.Tensor] = []
    for layer in model.get_decoder().layers:
        layer.register_forward_pre_hook(lambda module, args: inputs_of.append(args[0]))
    with llm_accel.apply(model, method):
        inputs_of.clear()  # of the trial call
        batch = inputs(model, UNEQUAL)
        output = model.generate(
            **batch, max_new_tokens=3, do_sample=False, output_hidden_states=True, return_dict_in_generate=True
        )
    assert len(inputs_of) == 9 and all(one.isfinite().all() for one in inputs_of)
    assert torch.equal(output.sequences[:, : batch["input_ids"].shape[1]], batch["input_ids"])
    assert [one.shape[1] for one in output.hidden_states[1]] == [1] * 4
