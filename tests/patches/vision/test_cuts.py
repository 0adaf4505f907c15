"""Visual tokens that leave after a layer: equal to hiding their keys behind it, at every decode step."""

from __future__ import annotations

import pytest
import torch

import llm_accel
from llm_accel import DyVTE, FastV, FlowCut, SnapKV, UnsupportedCallError
from tests.patches.calls import Outside
from tests.tiny_vlm import IMAGE, ONE, UNEQUAL, Scene, decode, inputs, require_mode, tiny_vlm
from tests.vision_oracle import decoder_inputs, hidden

EXACT = 2e-4


def visual(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return batch["input_ids"][0] == IMAGE


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", [0, 1])
def test_exit_equals_hidden_keys(layer: int, attention: str) -> None:
    model = tiny_vlm(attention=attention)
    with llm_accel.apply(model, "dyvte", exit=layer) as handle:
        _, logits = decode(model, inputs(model, UNEQUAL))
        report = handle.report()
    oracle = tiny_vlm()
    for row, scene in enumerate(UNEQUAL):
        alone = inputs(oracle, [scene])
        assert torch.allclose(logits[row], hidden(oracle, alone, visual(alone), layer), atol=EXACT)
    assert (report.exit_layer, report.visual_tokens_before, report.visual_tokens_after) == (layer, 48, 0)
    longest = inputs(oracle, UNEQUAL)["input_ids"].shape[1] + 5
    texts = max(sum(scene.text) for scene in UNEQUAL) + 5
    assert [one.physical_length for one in report.layers] == [longest] * (layer + 1) + [texts] * (2 - layer)
    assert {one.logical_length for one in report.layers} == {longest}


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_exit_in_other_families(family: str) -> None:
    model = tiny_vlm(family)
    outside, dense = Outside.of(model), decode(model, inputs(model, ONE))
    outside = Outside.of(model)
    with llm_accel.apply(model, "dyvte", exit=1):
        _, logits = decode(model, inputs(model, UNEQUAL))
    assert Outside.of(model) == outside
    assert torch.equal(decode(model, inputs(model, ONE))[1], dense[1])
    for row, scene in enumerate(UNEQUAL):
        alone = inputs(model, [scene])
        assert torch.allclose(logits[row], hidden(model, alone, visual(alone), 1), atol=EXACT)


@pytest.mark.parametrize("layer", [1, 2])
def test_fastv_equals_its_definition(layer: int) -> None:
    model, eager = tiny_vlm(), tiny_vlm(attention="eager")
    with llm_accel.apply(model, "fastv", layer=layer, ratio=0.25) as handle:
        _, logits = decode(model, inputs(model, UNEQUAL))
        assert handle.report().exit_layer == layer - 1
    for row, scene in enumerate(UNEQUAL):
        alone = inputs(model, [scene])
        given = decoder_inputs(eager, alone)
        maps = eager.get_decoder()(**given, use_cache=False, output_attentions=True).attentions
        paid = maps[layer - 1][0, :, -1].mean(0).masked_fill(~visual(alone), -1)
        kept = paid.topk(int(visual(alone).sum()) // 4).indices
        dropped = visual(alone).index_fill(0, kept, False)
        assert torch.allclose(logits[row], hidden(model, alone, dropped, layer - 1), atol=EXACT)


@pytest.mark.parametrize("config", [DyVTE(exit=2), FastV(layer=1, ratio=1.0), FastV(layer=2, budget=500)])
def test_nothing_to_cut(config: object) -> None:
    model = tiny_vlm()
    batch, text = inputs(model, UNEQUAL), inputs(model, [Scene((12,))])
    dense = decode(model, batch)[1], decode(model, text)[1]
    with llm_accel.apply(model, config) as handle:
        assert torch.equal(decode(model, batch)[1], dense[0])
        assert handle.report().exit_layer is None
        assert torch.equal(decode(model, text)[1], dense[1])


def test_an_image_at_the_end_stays() -> None:
    model = tiny_vlm()
    batch = inputs(model, [Scene((5, 0), 2)])
    dense = decode(model, batch)[1]
    with llm_accel.apply(model, "dyvte", exit=0):
        assert torch.equal(decode(model, batch)[1], dense)
        assert model(**batch, use_cache=False).past_key_values is None


def test_two_turns() -> None:
    """A second image in the second turn leaves as well; the dialogue at once gives the same."""
    model = tiny_vlm()
    first, later = inputs(model, ONE), inputs(model, [Scene((3, 4), 7)])
    with llm_accel.apply(model, "dyvte", exit=0) as handle:
        cache = handle.new_cache()
        answer, _ = decode(model, first, past_key_values=cache)
        ids = torch.cat([first["input_ids"], answer, later["input_ids"]], dim=1)
        both = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        second = decode(model, both | {"pixel_values": later["pixel_values"]}, past_key_values=cache)
        images = torch.cat([first["pixel_values"], later["pixel_values"]])
        whole = decode(model, both | {"pixel_values": images})
    assert torch.allclose(second[1], whole[1], atol=EXACT)
    assert torch.equal(second[0], whole[0])


@pytest.mark.parametrize("mode", [{"num_beams": 3}, {"output_hidden_states": True, "return_dict_in_generate": True}])
def test_modes(mode: dict[str, object]) -> None:
    model = tiny_vlm()
    batch = inputs(model, UNEQUAL)
    if "num_beams" in mode:
        require_mode(model, batch, mode, mode | {"use_cache": False})
    options = {"max_new_tokens": 6, "do_sample": False} | mode
    with llm_accel.apply(model, "dyvte", exit=1):
        got = model.generate(**batch, **options)
        wanted = model.generate(**batch, **{**options, "use_cache": "num_beams" not in mode})
    got, wanted = (one if torch.is_tensor(one) else one.sequences for one in (got, wanted))
    assert torch.equal(got, wanted)


def test_three_stages_together() -> None:
    """Patches leave in the tower, the rest of them after a layer, entries after the prompt: each row as if alone."""
    model = tiny_vlm()
    methods = [FlowCut(budget=8), FastV(layer=1, budget=3), SnapKV(budget=15, window=4)]
    with llm_accel.apply(model, methods) as handle:
        _, logits = decode(model, inputs(model, UNEQUAL))
        report = handle.report()
        for row, scene in enumerate(UNEQUAL):
            assert torch.allclose(logits[row], decode(model, inputs(model, [scene]))[1][0], atol=EXACT)
    assert (report.visual_tokens_before, report.visual_tokens_after) == (48, 6)
    assert "6 of 48 visual tokens reach the last layer, some left after layer 0" in str(report)
    assert max(layer.physical_length for layer in report.layers) == 15 + 5


def test_a_prompt_in_chunks_is_refused() -> None:
    model = tiny_vlm()
    with llm_accel.apply(model, "fastv"), pytest.raises(UnsupportedCallError, match="comes in chunks"):
        decode(model, inputs(model, ONE), prefill_chunk_size=8)


def test_embeddings_without_ids_are_refused() -> None:
    model = tiny_vlm()
    given = decoder_inputs(model, inputs(model, ONE))
    with llm_accel.apply(model, "dyvte", exit=0), pytest.raises(UnsupportedCallError, match="give input_ids"):
        model(inputs_embeds=given["inputs_embeds"])
