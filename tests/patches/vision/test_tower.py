"""FlowCut inside the tower: the kept patches, what becomes of them, and that images do not see one another."""

from __future__ import annotations

import pytest
import torch

import llm_accel
from llm_accel import FlowCut, SnapKV
from llm_accel.patches.families import family_of
from tests.patches.calls import Outside, failing_once
from tests.tiny_vlm import IMAGE, ONE, UNEQUAL, Scene, decode, inputs, pixels, tiny_vlm
from tests.vision_oracle import features_changed, flowcut, removed
from tests.vlm_zoo import built

EXACT = 2e-4


def features_of(model, **call):
    return model.base_model.get_image_features(**call, return_dict=True).pooler_output


def dropped_rows(features: torch.Tensor) -> torch.Tensor:
    return features[..., -1].isnan()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("budget", [15, 9, 4, 1])
def test_kept_patches_equal_the_published_procedure(budget: int, attention: str) -> None:
    model = tiny_vlm(attention=attention)
    images = torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    dense = features_of(model, pixel_values=images)
    wanted = [flowcut(model, image, budget) for image in images]
    with llm_accel.apply(model, "flowcut", budget=budget):
        together = features_of(model, pixel_values=images)
        for image, features, (kept, sizes) in zip(images, together, wanted, strict=True):
            alone = features_of(model, pixel_values=image[None])[0]
            assert torch.equal((~dropped_rows(features)).nonzero()[:, 0], kept)
            assert torch.equal(dropped_rows(alone), dropped_rows(features))
            assert torch.allclose(alone[kept], features[kept], atol=1e-5)
            assert len(kept) == budget == sizes[-1]
    # which patches are left changes the features of the others
    assert any(not torch.allclose(one[k], full[k]) for one, full, (k, _) in zip(together, dense, wanted, strict=True))
    if budget == 1:  # images are cut at their own pace, and their batch is padded meanwhile
        assert len({sizes[0] for _, sizes in wanted}) > 1


def test_generation_equals_rows_removed_by_hand() -> None:
    model = tiny_vlm()
    with llm_accel.apply(model, "flowcut", budget=5):
        _, logits = decode(model, inputs(model, UNEQUAL))
        features = [features_of(model, pixel_values=inputs(model, [scene])["pixel_values"]) for scene in UNEQUAL]
    for row, scene in enumerate(UNEQUAL):
        alone = inputs(model, [scene])
        pruned = torch.cat(list(features[row]))
        dropped = torch.zeros(alone["input_ids"].shape[1], dtype=torch.bool)
        dropped[alone["input_ids"][0] == IMAGE] = dropped_rows(pruned)
        with features_changed(model, lambda output, pruned=pruned: setattr(output, "pooler_output", [pruned])):
            reference = removed(model, alone, dropped)
        assert torch.allclose(logits[row], reference, atol=EXACT)


@pytest.mark.parametrize(
    "family", ["llava_next", "llava_onevision", "vipllava", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
)
@pytest.mark.parametrize("schedule", ["adaptive", "static"])
def test_other_families(family: str, schedule: str) -> None:
    """Whole merge units, whole images, the same alone and in a batch; nothing left behind."""
    model = tiny_vlm(family)
    dense = decode(model, inputs(model, UNEQUAL))
    outside = Outside.of(model)
    with llm_accel.apply(model, "flowcut", budget=6, schedule=schedule) as handle:
        _, logits = decode(model, inputs(model, UNEQUAL))
        report = handle.report()
        for row, scene in enumerate(UNEQUAL):
            alone = decode(model, inputs(model, [scene]))[1]
            assert torch.allclose(logits[row], alone[0], atol=EXACT)
        assert 0 < report.visual_tokens_after < report.visual_tokens_before
    assert Outside.of(model) == outside
    assert torch.equal(decode(model, inputs(model, UNEQUAL))[1], dense[1])


def test_windowed_tower_scores_tokens_where_they_stand() -> None:
    """Qwen2.5-VL: an image that is black but for one block keeps that block, wherever the windows have put it. Only the
    first layer is looked at, before that block has spread."""
    model = tiny_vlm("qwen2_5_vl")
    model.model.visual.fullatt_block_indexes = [0]
    for block in model.model.visual.blocks:
        block.attn.qkv.bias.zero_()
    for unit in (0, 3, 5, 14):
        pixels, generator = torch.zeros(64, 3 * 2 * 14 * 14), torch.Generator().manual_seed(unit)
        pixels[4 * unit : 4 * unit + 4] = 4 * torch.randn(4, 3 * 2 * 14 * 14, generator=generator)
        with llm_accel.apply(model, "flowcut", budget=1, llm_stage="off"):
            features = features_of(model, pixel_values=pixels, image_grid_thw=torch.tensor([[1, 8, 8]]))[0]
        assert len(features) == 16
        assert (~dropped_rows(features)).nonzero()[:, 0].tolist() == [unit]


def test_shuffled_tokens_stand_for_their_patches() -> None:
    """InternVL: numbers of patches end where the model's own pixel shuffle puts the patches."""
    model = tiny_vlm("internvl")
    numbers = torch.arange(64.0)
    shuffled = model.model.pixel_shuffle(numbers.view(1, 8, 8, 1), scale_factor=0.5)
    packed = family_of(model, "flowcut").packed(model.model, {}, [numbers[:, None]])
    assert torch.equal(packed[0], shuffled.mean(-1).flatten()[:, None])


@pytest.mark.parametrize("newline", ["drop", "keep"])
def test_newlines_of_tiled_images(newline: str) -> None:
    """LLaVA-NeXT: tiles share the budget evenly; newline rows go with the first dropped token, or all stay."""
    model = tiny_vlm("llava_next")
    image = pixels("llava_next", 1)  # 56 x 40: a copy and 2 x 2 tiles; 8 lines of 6 patches are left of the tiles
    dense = features_of(model, **image)[0]
    with llm_accel.apply(model, "flowcut", budget=20, newline=newline):
        features = features_of(model, **image)[0]
    kept = ~dropped_rows(features)
    newlines = (dense == model.model.image_newline).all(-1)
    assert int(newlines.sum()) == 8
    assert int((kept & newlines).sum()) == (8 if newline == "keep" else 0)
    assert int(kept[:16].sum()) == 4  # the copy is a tile like the others
    assert 4 < int((kept & ~newlines).sum()) <= 20


def test_nothing_to_cut() -> None:
    model = tiny_vlm()
    batch = inputs(model, UNEQUAL)
    dense = decode(model, batch)
    for options in ({"ratio": 1.0}, {"budget": 16}, {"budget": 99}):
        with llm_accel.apply(model, "flowcut", **options):
            assert torch.equal(decode(model, batch)[1], dense[1])


def test_one_patch_leaves() -> None:
    model = tiny_vlm()
    image = torch.randn(1, 3, 28, 28)
    with llm_accel.apply(model, "flowcut", budget=15):
        assert int(dropped_rows(features_of(model, pixel_values=image)[0]).sum()) == 1


def test_with_snapkv() -> None:
    """The KV method sees what is left: its budget holds, and nothing more happens below it."""
    model = tiny_vlm()
    batch = inputs(model, UNEQUAL)
    with llm_accel.apply(model, [FlowCut(budget=5), SnapKV(budget=14, window=4)], trace=True) as handle:
        _, logits = decode(model, batch)
        report = handle.report()
        for row, scene in enumerate(UNEQUAL):
            assert torch.allclose(logits[row], decode(model, inputs(model, [scene]))[1][0], atol=EXACT)
    assert {layer.physical_length for layer in report.layers} == {14 + 5}
    assert {layer.logical_length for layer in report.layers} == {batch["input_ids"].shape[1] + 5}
    kept = report.layers[0].kept[0, 0]
    ids = inputs(model, [UNEQUAL[0]])["input_ids"][0]
    assert kept[-4:].tolist() == list(range(len(ids) - 4, len(ids)))
    with llm_accel.apply(model, "flowcut", budget=5):
        alone = decode(model, batch)[1]
    assert torch.equal(alone[:, 0], logits[:, 0]) and not torch.equal(alone, logits)


def test_two_turns_and_a_failure_between() -> None:
    """A second question on the pruned cache equals the whole dialogue at once; a failed call leaves nothing behind."""
    model, question = tiny_vlm(), torch.randint(3, 100, (1, 5), generator=torch.Generator().manual_seed(9))
    batch = inputs(model, ONE)
    with llm_accel.apply(model, "flowcut", budget=5) as handle:
        with failing_once(model.base_model.vision_tower.encoder.layers[1]):
            decode(model, batch)
        cache = handle.new_cache()
        answer, _ = decode(model, batch, past_key_values=cache)
        ids = torch.cat([batch["input_ids"], answer, question], dim=1)
        again = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        second = decode(model, again, past_key_values=cache)
        whole = decode(model, batch | again)
    assert torch.equal(second[0], whole[0])
    assert torch.allclose(second[1], whole[1], atol=EXACT)


def test_class_token_as_a_feature() -> None:
    """With ``vision_feature_select_strategy="full"`` the class token is one of the budget and always stays."""
    model = tiny_vlm()
    image = torch.randn(1, 3, 28, 28)
    with llm_accel.apply(model, "flowcut", budget=5):
        features = features_of(model, pixel_values=image, vision_feature_select_strategy="full")[0]
    kept = (~dropped_rows(features)).nonzero()[:, 0]
    assert len(features) == 17 and len(kept) == 5 and int(kept[0]) == 0


def test_several_images_share_nothing() -> None:
    model = tiny_vlm()
    scene = Scene((2, 2, 2, 4), 4)
    with llm_accel.apply(model, "flowcut", ratio=0.25) as handle:
        decode(model, inputs(model, [scene]))
        report = handle.report()
    assert (report.visual_tokens_before, report.visual_tokens_after) == (48, 12)


def test_copies_of_an_image_keep_the_same_patches() -> None:
    model = tiny_vlm()
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(4))
    with llm_accel.apply(model, "flowcut", budget=3):
        first, _, copy = features_of(model, pixel_values=images[[0, 1, 0]])
    assert torch.equal(dropped_rows(first), dropped_rows(copy)) and torch.allclose(
        first[~dropped_rows(first)], copy[~dropped_rows(copy)], atol=1e-6
    )


@pytest.mark.parametrize("family", ["llava_next", "llava_next_video"])
def test_tiles_lose_the_patches_that_the_tower_dropped(family: str) -> None:
    """LLaVA-NeXT: patches numbered by tile and place go through the model's packing; the tokens that stay are those of
    the patches that each tile keeps when it is given alone to a LLaVA of the same tower."""
    model, alone = tiny_vlm("llava_next") if family == "llava_next" else built(family), tiny_vlm()
    alone.model.vision_tower = model.model.vision_tower
    image = pixels("llava_next", 1)
    numbers = torch.arange(5 * 16.0).view(5, 16, 1)
    call = image | {"vision_feature_select_strategy": "default"}
    packed = family_of(model, "flowcut").packed(model.model, call, list(numbers))[0][:, 0]
    with llm_accel.apply(alone, "flowcut", budget=4, llm_stage="off"):
        tiles = features_of(alone, pixel_values=image["pixel_values"][0])
    kept = torch.cat([torch.arange(16.0)[~dropped_rows(one)] + 16 * tile for tile, one in enumerate(tiles)])
    with llm_accel.apply(model, "flowcut", budget=20):
        stays = ~dropped_rows(features_of(model, **image)[0])
    assert torch.equal(stays, torch.isin(packed, kept))
