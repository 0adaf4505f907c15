"""``positions="compact"``: rows removed by hand and counted anew give the same, at every step and in every turn."""

from __future__ import annotations

import pytest
import torch

import llm_accel
from llm_accel import ConfigError, Downsample, FlowCut, SnapKV, StrideTokens
from tests.patches.vision.test_families import dropped_by, model_of
from tests.tiny_vlm import ONE, UNEQUAL, Scene, decode, inputs, require_mode, tiny_vlm
from tests.vision_oracle import removed

EXACT = 2e-4
COMPACT = StrideTokens(budget=3, positions="compact")


@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl"])
def test_rows_equal_the_reference(family: str) -> None:
    model = model_of(family)
    with llm_accel.apply(model, COMPACT):
        _, logits = decode(model, inputs(model, UNEQUAL))
    for row, scene in enumerate(UNEQUAL):
        alone = inputs(model, [scene])
        dropped = dropped_by(model, alone, COMPACT)
        assert torch.allclose(logits[row], removed(model, dict(alone), dropped, compact=True), atol=EXACT)
        assert not torch.allclose(logits[row], removed(model, dict(alone), dropped), atol=EXACT)


def test_nothing_dropped_counts_as_before() -> None:
    model = model_of("llava")
    batch, text = inputs(model, UNEQUAL), inputs(model, [Scene((12,))])
    dense = decode(model, batch)[1], decode(model, text)[1]
    with llm_accel.apply(model, "stride_tokens", budget=500, positions="compact"):
        assert torch.equal(decode(model, batch)[1], dense[0])
    with llm_accel.apply(model, COMPACT):
        decode(model, batch)
        assert torch.equal(decode(model, text)[1], dense[1])


def test_two_turns_with_an_image_each_and_a_third_without() -> None:
    model = model_of("llava")
    first, later = inputs(model, ONE), inputs(model, [Scene((3, 4), 7)])
    words = torch.randint(3, 100, (1, 5), generator=torch.Generator().manual_seed(2))
    with llm_accel.apply(model, COMPACT) as handle:
        cache = handle.new_cache()
        answer, _ = decode(model, first, past_key_values=cache)
        ids = torch.cat([first["input_ids"], answer, later["input_ids"]], dim=1)
        both = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        answer, _ = decode(model, both | {"pixel_values": later["pixel_values"]}, past_key_values=cache)
        ids = torch.cat([ids, answer, words], dim=1)
        all_three = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        third = decode(model, all_three, past_key_values=cache)
        images = torch.cat([first["pixel_values"], later["pixel_values"]])
        whole = decode(model, all_three | {"pixel_values": images})
    assert torch.equal(third[0], whole[0])
    assert torch.allclose(third[1], whole[1], atol=EXACT)


def test_forward_without_positions() -> None:
    """Prompt and steps of a caller who leaves positions to the model."""
    model = model_of("llava")
    batch = inputs(model, ONE)
    with llm_accel.apply(model, COMPACT) as handle:
        tokens, wanted = decode(model, batch)
        cache = handle.new_cache()
        model(batch["input_ids"], pixel_values=batch["pixel_values"], past_key_values=cache)
        step = model(tokens[:, :1], past_key_values=cache).logits[:, -1]
    assert torch.allclose(step, wanted[:, 1], atol=EXACT)


@pytest.mark.parametrize("mode", ["uncached", "beams", "chunks", "snapkv"])
def test_modes(mode: str) -> None:
    model = model_of("llava")
    batch = inputs(model, ONE)
    beams = {"num_beams": 3}
    if mode == "beams":
        require_mode(model, batch, beams, beams | {"use_cache": False})
    if mode == "chunks":
        require_mode(model, batch, {"prefill_chunk_size": 11}, {})
    methods = [FlowCut(budget=5, positions="compact")] + ([SnapKV(budget=500, window=4)] if mode == "snapkv" else [])
    with llm_accel.apply(model, methods):
        if mode == "beams":
            options = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
            got, wanted = (model.generate(**batch, **options, use_cache=cache) for cache in (True, False))
            assert torch.equal(got, wanted)
            return
        changes = {"uncached": {"use_cache": False}, "chunks": {"prefill_chunk_size": 11}}.get(mode, {})
        got = decode(model, batch, **changes)
    with llm_accel.apply(model, "flowcut", budget=5, positions="compact"):
        wanted = decode(model, batch)
    assert torch.equal(got[0], wanted[0])
    assert torch.allclose(got[1], wanted[1], atol=EXACT)


def test_positions_with_several_axes_stay() -> None:
    with pytest.raises(ConfigError, match="say where in the image a token stands; use positions='original'"):
        llm_accel.apply(tiny_vlm("qwen2_vl"), Downsample(budget=2, positions="compact"))
