"""FlowCut's second stage: twice the budget enters the language model, and a layer of it takes out the rest."""

from __future__ import annotations

import pytest
import torch

import llm_accel
from llm_accel import ConfigError, DyVTE, FlowCut, SnapKV, UnsupportedCallError
from llm_accel.methods import CutModel
from llm_accel.methods.visual.flowcut import MANY
from llm_accel.patches.vision.tombstones import buried, surplus_of, tombstones
from tests.patches.vision.test_stages import in_pieces
from tests.tiny_vlm import IMAGE, ONE, UNEQUAL, Scene, decode, frames, inputs, pixels, require_mode, tiny_vlm
from tests.vision_oracle import decoder_inputs, last_query

EXACT = 2e-4


@pytest.mark.parametrize(("layer", "attention"), [(1, "sdpa"), (0, "eager")])
def test_both_stages_equal_the_oracle(layer: int, attention: str) -> None:
    """A left-padded batch with one image and with two: each row keeps its budget for every image in all, chosen in
    float64 from what entered; logits are those of a decoder without the rows, from where they leave."""
    model, oracle = tiny_vlm(attention=attention), tiny_vlm()
    method = FlowCut(budget=3, llm_stage="on", llm_layer=layer)
    with llm_accel.apply(model, method) as handle:
        _, logits = decode(model, inputs(model, UNEQUAL))
        report = handle.report()
    assert (report.visual_tokens_before, report.visual_tokens_after, report.exit_layer) == (48, 9, layer)
    for row, scene in enumerate(UNEQUAL):
        alone = inputs(oracle, [scene])
        visual = alone["input_ids"][0] == IMAGE
        with llm_accel.apply(oracle, method):
            features = torch.cat(oracle.base_model.get_image_features(alone["pixel_values"]).pooler_output)
        given, first = decoder_inputs(oracle, alone), visual.clone()
        given["inputs_embeds"][0, visual] = features
        first[visual] = features[:, 0].isinf()
        entered = {
            "inputs_embeds": given["inputs_embeds"][:, ~first],
            "position_ids": given["position_ids"][..., ~first],
        }
        images = scene.images
        assert int((visual & ~first).sum()) == 6 * images
        scores = last_query(oracle, entered, visual[~first], layer)
        left = (visual & ~first).nonzero()[:, 0]
        second = visual.index_fill(0, left[scores.topk(3 * images).indices], False)
        reference = in_pieces(oracle, given, [(0, first), (layer + 1, second)], None)
        assert torch.allclose(logits[row], reference, atol=EXACT)


def test_when_there_is_a_second_stage() -> None:
    """auto: by the tokens of the whole image, tiles together; twice the budget, shared by its tiles."""
    method = FlowCut(budget=160)
    assert MANY == 1024 and method.first_stage_tokens(1024) == 160 and method.first_stage_tokens(1025) == 320
    assert (
        method.first_stage_tokens(576) == 160
        and method.first_stage_tokens(576, parts=5) == 64
        and method.tokens(576, parts=5) == 32
    )
    assert FlowCut(ratio=0.1).first_stage_tokens(576, parts=5) == 116  # 2 * 288 by 5, rounded up
    assert FlowCut(budget=160, llm_stage="off").first_stage_tokens(2000) == 160
    assert FlowCut(budget=10, llm_stage="on", vision_factor=1.5).first_stage_tokens(16) == 15
    assert FlowCut(budget=10, llm_stage="on").first_stage_tokens(16) == 10  # twice as many would be all of them


def test_layers_that_a_model_allows() -> None:
    method = FlowCut(llm_stage="on")
    assert method.second_stage(CutModel("a", 32, 8)).layers == (1,)
    assert method.second_stage(CutModel("a", 32, 8, first=3)).layers == (3,)
    assert FlowCut().second_stage(CutModel("a", 2, 8)) is None
    assert FlowCut(llm_stage="off").second_stage(CutModel("a", 32, 8)) is None
    with pytest.raises(ConfigError, match="nothing is saved after layer 1"):
        method.second_stage(CutModel("a", 2, 8))


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_families(family: str) -> None:
    """The budget is reached in all, and each row of a batch gets what it gets alone."""
    model = tiny_vlm(family)
    dense = decode(model, inputs(model, UNEQUAL))[1]
    with llm_accel.apply(model, FlowCut(budget=2, llm_stage="on", llm_layer=0)) as handle:
        entered = sum(
            int((~one[:, -1].isnan()).sum())
            for one in model.base_model.get_image_features(**pixels(family, 1), return_dict=True).pooler_output
        )
        _, logits = decode(model, inputs(model, UNEQUAL))
        report = handle.report()
        for row, scene in enumerate(UNEQUAL):
            assert torch.allclose(logits[row], decode(model, inputs(model, [scene]))[1][0], atol=EXACT)
    assert 2 < entered <= 5 and report.visual_tokens_after == 2 * sum(scene.images for scene in UNEQUAL)
    assert report.exit_layer == (1 if family == "qwen3_vl" else 0)
    assert torch.equal(decode(model, inputs(model, UNEQUAL))[1], dense)


def test_videos() -> None:
    """Each frame has its budget, and the frames of a row share their sum."""
    model = tiny_vlm("qwen2_vl")
    batch = inputs(model, ONE, video=True)
    with llm_accel.apply(model, FlowCut(budget=1, llm_stage="on")) as handle:
        features = model.base_model.get_video_features(**frames("qwen2_vl", 1), return_dict=True).pooler_output
        assert int((~torch.cat(list(features))[:, -1].isnan()).sum()) == 6
        decode(model, batch)
        assert handle.report().visual_tokens_after == 3


def test_chunks_where_nothing_is_left_to_cut() -> None:
    """A cut between layers cannot take chunks and says so; without surplus there is none."""
    model, chunks = tiny_vlm(), {"prefill_chunk_size": 11}
    batch = inputs(model, ONE)
    require_mode(model, batch, chunks, {})
    with llm_accel.apply(model, "flowcut", budget=5):
        assert torch.allclose(decode(model, batch, **chunks)[1], decode(model, batch)[1], atol=EXACT)
    with (
        llm_accel.apply(model, "flowcut", budget=5, llm_stage="on"),
        pytest.raises(UnsupportedCallError, match="comes in chunks"),
    ):
        decode(model, batch, **chunks)


def test_prompts_without_surplus_are_left_alone() -> None:
    model = tiny_vlm()
    text = inputs(model, [Scene((12,))])
    dense = decode(model, text)[1]
    with llm_accel.apply(model, "flowcut", budget=5, llm_stage="on"):
        assert torch.equal(decode(model, text)[1], dense)


def test_with_other_methods() -> None:
    """Another cut takes the place of the automatic stage, and refuses one that was asked for."""
    model = tiny_vlm()
    batch = inputs(model, ONE)
    with pytest.raises(ConfigError, match="both let visual tokens leave after a layer"):
        llm_accel.apply(model, [FlowCut(budget=3, llm_stage="on"), DyVTE(exit=1)])
    with llm_accel.apply(model, [FlowCut(budget=3), DyVTE(exit=1)]):
        both = decode(model, batch)[1]
    with llm_accel.apply(model, [FlowCut(budget=3, llm_stage="off"), DyVTE(exit=1)]):
        assert torch.equal(decode(model, batch)[1], both)
    with llm_accel.apply(model, [FlowCut(budget=3, llm_stage="on"), SnapKV(budget=12, window=4)]) as handle:
        decode(model, batch)
        assert [layer.physical_length for layer in handle.report().layers] == [12 + 5] * 3
        assert handle.report().visual_tokens_after == 3


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_the_first_tombstone_tells_the_surplus(kind: torch.dtype) -> None:
    rows = torch.randn(2, 9, 6)
    kept = torch.tensor([True, False, False, True, True, False, True, True, True])
    marked = torch.stack([buried(rows[0], kept, surplus=300), buried(rows[1], kept)]).to(kind)
    marked = torch.cat([marked, torch.stack([buried(rows[0], kept, surplus=16383), buried(rows[1], ~kept)])], 1)
    gone = tombstones(marked)
    assert torch.equal(gone[0], torch.cat([~kept, ~kept])) and torch.equal(gone[1], torch.cat([~kept, kept]))
    assert surplus_of(marked, gone).tolist() == [300 + 16383, 0]


@pytest.mark.parametrize(("family", "entering"), [("qwen2_vl", 4), ("qwen2_5_vl", 4), ("llava", 2)])
def test_the_released_form_for_qwen_has_both_stages(family: str, entering: int) -> None:
    """Images of any size: by default twice the budget enters the language model of Qwen, and the budget goes on."""
    model = tiny_vlm(family)
    image, batch = pixels(family, 1), inputs(model, [Scene((4, 3, 9), 5)])
    told = {}
    for stage in ("auto", "on", "off"):
        with llm_accel.apply(model, FlowCut(budget=2, llm_stage=stage)) as handle:
            features = torch.cat(list(model.base_model.get_image_features(**image, return_dict=True).pooler_output))
            logits = decode(model, batch)[1]
            told[stage] = int((~features[:, -1].isnan()).sum()), logits, handle.report().exit_layer
            assert handle.report().visual_tokens_after == 4  # of two images
    assert told["auto"][0] == entering and (told["on"][0], told["off"][0]) == (4, 2)
    assert torch.equal(told["auto"][1], told["off" if family == "llava" else "on"][1])
    assert told["auto"][2] == (None if family == "llava" else 1)
