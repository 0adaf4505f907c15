"""The benchmark's model shares weights between layers and nothing else, and its variants save what they say."""

from __future__ import annotations

import torch

from benchmarks.tower_cut import IMAGE, RATIO, VARIANTS, build_model, kept, make_prompt, measure


@torch.inference_mode()
def test_variants_of_a_narrow_model() -> None:
    model, prompt = build_model(share=4, narrow=4), make_prompt(side=12, text=10)
    tower, decoder = model.model.visual, model.model.language_model
    assert (len(tower.blocks), len(decoder.layers), tower.fullatt_block_indexes) == (8, 9, [1, 3, 5, 7])
    assert decoder.layers[0].mlp is not decoder.layers[1].mlp
    assert decoder.layers[0].mlp.up_proj.weight is decoder.layers[1].mlp.up_proj.weight
    assert int((prompt["input_ids"] == IMAGE).sum()) == 36
    assert all(len(kept(model, prompt, VARIANTS[name])) == 36 * RATIO for name in ("behind", "inside"))
    assert len(kept(model, prompt, VARIANTS["two_stages_inside"])) == 2 * 36 * RATIO
    found = measure(model, prompt, 1, list(VARIANTS))
    gflop = found["gflop"]
    assert gflop["inside"] < gflop["inside_published"] <= gflop["behind"] < gflop["dense"]
    assert set(found["visual_tokens_after"].values()) == {12}
    rows, width = 4 * (36 - 12), 1280 // 4
    saved = (
        2 * rows * (4 * width**2 + 3 * width * (3420 // 4))
    )  # of a layer's linear maps; six layers lie behind the cut
    assert 6 * saved < 1e9 * (gflop["behind"] - gflop["inside"]) < 6 * 1.2 * saved
    assert found["behind_over_inside"][""]["counted"] == gflop["behind"] / gflop["inside"]


@torch.inference_mode()
def test_a_narrow_model_with_a_class_token() -> None:
    """One tile of InternVL; the last of its layers but one is the last that patches leave after."""
    model, prompt = build_model(4, 4, "internvl"), make_prompt(12, 10, "internvl")
    assert (len(model.model.vision_tower.encoder.layer), len(model.model.language_model.layers)) == (6, 7)
    assert len(kept(model, prompt, VARIANTS["inside"])) == 36 * RATIO
    gflop = measure(model, prompt, 1, ["dense", "behind", "inside"])["gflop"]
    rows, width = 4 * (36 - 12), 1024 // 4
    saved = 2 * rows * (4 * width**2 + 2 * width * 4096 // 4)  # of linear maps; four layers lie behind it
    assert gflop["behind"] < gflop["dense"]
    assert 4 * saved < 1e9 * (gflop["behind"] - gflop["inside"]) < 4 * 1.2 * saved
