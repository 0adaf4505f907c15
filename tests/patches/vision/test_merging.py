"""VisionZip behind the tower: which features the language model gets, in every family."""

from __future__ import annotations

import pytest
import torch

import llm_accel
from llm_accel import VisionZip
from tests.patches.calls import Outside
from tests.tiny_vlm import FAMILIES, IMAGE, ONE, UNEQUAL, decode, inputs, pixels, tiny_vlm
from tests.vision_oracle import published_visionzip, removed, visionzip

EXACT = 2e-4


def features_of(model, image, **call):
    return list(model.base_model.get_image_features(**image, **call, return_dict=True).pooler_output)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("dominant", "contextual"), [(5, 3), (1, 1), (9, 6)])
def test_features_equal_the_oracle(dominant: int, contextual: int, attention: str) -> None:
    model = tiny_vlm(attention=attention)
    images = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    wanted = [visionzip(model, image, dominant, contextual) for image in images]
    method = VisionZip(dominant=dominant, contextual=contextual, variant="spread")
    with llm_accel.apply(model, method):
        for features, (merged, kept) in zip(features_of(model, {"pixel_values": images}), wanted, strict=True):
            assert (~features[:, -1].isnan()).nonzero()[:, 0].tolist() == kept.tolist()
            assert torch.allclose(features[kept], merged, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("dominant", "contextual"), [(5, 3), (2, 1), (9, 6)])
def test_the_published_form_is_the_default(dominant: int, contextual: int, attention: str) -> None:
    """Class token, dominant, then contextual tokens, as many as the budget; the language model counts them without
    gaps, and each row of a batch gets what it would get alone."""
    model = tiny_vlm(attention=attention)
    images = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    wanted = [published_visionzip(model, image, dominant, contextual)[0] for image in images]
    method = VisionZip(dominant=dominant, contextual=contextual)
    with llm_accel.apply(model, method):
        found = features_of(model, {"pixel_values": images})
        for features, published in zip(found, wanted, strict=True):
            assert torch.allclose(features[~features[:, -1].isnan()], published, atol=1e-5)
        logits = decode(model, inputs(model, UNEQUAL))[1]
    for row, scene in enumerate(UNEQUAL):
        alone = inputs(model, [scene])
        visual = alone["input_ids"][0] == IMAGE
        published = [published_visionzip(model, one, dominant, contextual)[0] for one in alone["pixel_values"]]
        filled = [torch.nn.functional.pad(one, (0, 0, 0, 16 - len(one))) for one in published]
        dropped = visual.clone()
        dropped[visual] = torch.cat([torch.arange(16) >= len(one) for one in published])
        genuine = model.base_model.get_image_features

        def replaced(*args, filled=filled, genuine=genuine, **kwargs):
            output = genuine(*args, **kwargs)
            output.pooler_output = filled
            return output

        model.base_model.get_image_features = replaced
        try:
            assert torch.allclose(logits[row], removed(model, alone, dropped, compact=True), atol=EXACT)
        finally:
            del model.base_model.get_image_features


def test_places_of_the_published_tokens() -> None:
    """Where positions are kept, dominant and contextual tokens stand in their own places, and the class token in the
    first one that is free."""
    model = tiny_vlm()
    image = pixels("llava", 0)
    with torch.no_grad():
        published, dominant, contextual = published_visionzip(model, image["pixel_values"][0], 4, 3)
    with llm_accel.apply(model, VisionZip(dominant=4, contextual=3, positions="original")):
        features = features_of(model, image)[0]
    places = [row - 1 for row in (*dominant[1:], *contextual)]
    spare = min(set(range(16)) - set(places))
    assert (~features[:, -1].isnan()).nonzero()[:, 0].tolist() == sorted([spare, *places])
    assert torch.allclose(features[[spare, *places]], published, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    """A row of a batch gets what it gets alone; dominant tokens keep their features; nothing is left behind."""
    model = tiny_vlm(family)
    image, batch = pixels(family, 1), inputs(model, UNEQUAL)
    outside, dense, full = Outside.of(model), decode(model, batch)[1], features_of(model, image)
    method = VisionZip(dominant=2, contextual=1)
    with llm_accel.apply(model, method) as handle:
        _, logits = decode(model, batch)
        for row, scene in enumerate(UNEQUAL):
            assert torch.allclose(logits[row], decode(model, inputs(model, [scene]))[1][0], atol=EXACT)
        assert 0 < handle.report().visual_tokens_after < handle.report().visual_tokens_before
        for features, before in zip(features_of(model, image), full, strict=True):
            kept = ~features[:, -1].isnan()
            same = (features == before).all(-1)
            assert 0 < int(kept.sum()) <= 5 and int(same.sum()) <= int(kept.sum())
            if family not in ("llava", "llava_next", "video_llava"):  # those merge before the projector, tile by tile
                assert (int(kept.sum()), int(same.sum())) == (3, 2)
    assert Outside.of(model) == outside
    assert torch.equal(decode(model, batch)[1], dense)


def test_nothing_to_merge() -> None:
    model = tiny_vlm()
    batch = inputs(model, UNEQUAL)
    dense = decode(model, batch)[1]
    for options in ({}, {"budget": 16}, {"ratio": 1.0}):
        with llm_accel.apply(model, "visionzip", **options):
            assert torch.equal(decode(model, batch)[1], dense)


def test_class_token_as_a_feature() -> None:
    """With ``vision_feature_select_strategy="full"`` the class token is one of the budget and keeps its features."""
    model = tiny_vlm()
    image = pixels("llava", 0)
    call = {"vision_feature_select_strategy": "full"}
    dense = features_of(model, image, **call)[0]
    with llm_accel.apply(model, "visionzip", budget=6):
        features = features_of(model, image, **call)[0]
    kept = (~features[:, -1].isnan()).nonzero()[:, 0]
    assert len(features) == 17 and len(kept) == 6 and int(kept[0]) == 0
    assert torch.allclose(features[0], dense[0])


def test_only_the_layer_whose_features_are_used_is_looked_at() -> None:
    model = tiny_vlm()
    layers: list[int] = []

    class Watching(VisionZip):
        def score(self, view, before):
            assert before is None
            layers.append(view.layer)
            return super().score(view, before)

    with llm_accel.apply(model, Watching(budget=4)):
        decode(model, inputs(model, ONE))
    assert set(layers) == {3}
