"""Down-sampling: the tower runs on a smaller image, whose tokens stand spread over the full one's."""

from __future__ import annotations

import pytest
import torch

import llm_accel
from llm_accel import Downsample, UnsupportedModelError
from llm_accel.patches.families import FAMILIES
from tests.patches.calls import Outside
from tests.tiny_vlm import UNEQUAL, decode, inputs, pixels, tiny_vlm

EXACT = 2e-4


def features_of(model, **call):
    return list(model.base_model.get_image_features(**call, return_dict=True).pooler_output)


def resized(images: torch.Tensor, side: int) -> torch.Tensor:
    return torch.nn.functional.interpolate(images, (side, side), mode="bicubic", antialias=True)


@pytest.mark.parametrize(("budget", "side", "lines"), [(5, 2, [1, 3]), (9, 3, [0, 2, 3]), (1, 1, [2])])
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_clip_sees_the_smaller_image(budget: int, side: int, lines: list[int], strategy: str) -> None:
    model = tiny_vlm()
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    holder = model.base_model
    hidden = holder.vision_tower(
        resized(images, 7 * side), interpolate_pos_encoding=True, output_hidden_states=True
    ).hidden_states[-2]
    wanted = holder.multi_modal_projector(hidden if strategy == "full" else hidden[:, 1:])
    with llm_accel.apply(model, "downsample", budget=budget):
        got = features_of(model, pixel_values=images, vision_feature_select_strategy=strategy)
    own = int(strategy == "full")
    rows = [0] * own + [own + 4 * row + column for row in lines for column in lines]
    for features, smaller in zip(got, wanted, strict=True):
        assert len(features) == 16 + own
        assert (~features[:, -1].isnan()).nonzero()[:, 0].tolist() == rows
        assert torch.allclose(features[rows], smaller, atol=1e-5)


@pytest.mark.parametrize("family", ["llava", "vipllava", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_families(family: str) -> None:
    """The full image's features where it is small enough; a row of a batch as if alone; undo."""
    model = tiny_vlm(family)
    image, batch = pixels(family, 1), inputs(model, UNEQUAL)
    outside, dense = Outside.of(model), decode(model, batch)[1]
    with llm_accel.apply(model, "downsample", budget=500):
        assert torch.equal(decode(model, batch)[1], dense)
    with llm_accel.apply(model, Downsample(budget=4)) as handle:
        kept = int((~features_of(model, **image)[0][:, -1].isnan()).sum())
        assert kept == (2 if family.startswith("qwen") else 4)  # 2 x 4 tokens become 1 x 2
        _, logits = decode(model, batch)
        for row, scene in enumerate(UNEQUAL):
            assert torch.allclose(logits[row], decode(model, inputs(model, [scene]))[1][0], atol=EXACT)
        assert 0 < handle.report().visual_tokens_after <= handle.report().visual_tokens_before
    assert not torch.equal(logits, dense)
    assert Outside.of(model) == outside
    assert torch.equal(decode(model, batch)[1], dense)


def test_features_that_join_later_follow_their_tokens() -> None:
    """Qwen3-VL adds features of a tower layer behind the decoder's first: they stand where the tokens do."""
    model = tiny_vlm("qwen3_vl")
    image = pixels("qwen3_vl", 1)
    with llm_accel.apply(model, "downsample", budget=2) as handle:
        ours = model.base_model.get_image_features(**image, return_dict=True)
        call, _ = FAMILIES["qwen3_vl"].smaller(model.base_model, image, Downsample(budget=2))
        with handle.disabled():
            smaller = model.base_model.get_image_features(**call, return_dict=True)
    kept = ~ours.pooler_output[0][:, -1].isnan()
    assert torch.equal(ours.pooler_output[0][kept], smaller.pooler_output[0])
    for level, wanted in zip(ours.deepstack_features, smaller.deepstack_features, strict=True):
        rows = level if torch.is_tensor(level) else torch.cat(level)  # older versions keep all images together
        assert len(rows) == len(kept)
        assert torch.equal(rows[kept], wanted if torch.is_tensor(wanted) else torch.cat(wanted))


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_tiles_are_refused(family: str) -> None:
    model = tiny_vlm(family)
    outside = Outside.of(model)
    with pytest.raises(UnsupportedModelError, match=r"tiles of one size together; supported: llava, vipllava"):
        llm_accel.apply(model, "downsample")
    assert Outside.of(model) == outside
