"""FlowCut inside InternVL's tower: whole tokens, 2 x 2 patches that do not follow one another, leave half-way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel

import llm_accel
from llm_accel import PAINT, FlowCut, UnsupportedCallError
from llm_accel.patches.families import family_of
from llm_accel.patches.vision.watch import MARKS
from tests.patches.calls import Outside
from tests.patches.vision.test_grounding import Entering
from tests.tile_oracle import Kept, flowcut
from tests.tiny_vlm import IMAGE, ONE, TEXT, UNEQUAL, Scene, decode, inputs, widened
from tests.vision_oracle import features_changed, removed

EXACT = 1e-3  # of values around 10
DEPTH = 7
TILED = (Scene((4, 0, 0, 9), 5), Scene((2, 6), 6), Scene((3, 0, 2, 5), 7))  # rows of three, one and three tiles
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
    "image_size": [56, 56],
    "patch_size": [7, 7],
}
TOWERS = {
    "layer_norm": {},
    "rms_norm": {"norm_type": "rms_norm", "use_qk_norm": True, "use_mean_pooling": False, "attention_bias": True},
}


def deep(tower: str = "layer_norm", attention: str = "sdpa", ratio: float = 0.5) -> PreTrainedModel:
    """A tower of seven layers with positions, a class token, and attention to few patches, so that others leave step by
    step."""
    config = hf.InternVLConfig(
        vision_config=hf.InternVLVisionConfig(**VISION, **TOWERS[tower]),
        text_config=hf.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        image_seq_length=16,
        downsample_ratio=ratio,
    )
    torch.manual_seed(0)
    model = widened(hf.AutoModelForImageTextToText.from_config(config, attn_implementation=attention))
    with torch.no_grad():
        for name, weight in model.model.vision_tower.named_parameters():
            if "lambda" in name:
                weight.fill_(0.5)
            elif name.startswith("embeddings.") and weight.ndim == 3:
                weight.normal_(std=0.5)
            elif name.endswith(("q_norm.weight", "q_proj.weight")):
                weight.mul_(3)
    return model


def tiles(count: int = 4, side: int = 56) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def features_of(model: PreTrainedModel, pixels: Tensor, **call: object) -> Tensor:
    return model.model.get_image_features(pixel_values=pixels, return_dict=True, **call).pooler_output


def check(features: Tensor, expected: list[Kept]) -> None:
    """Which tokens stay of each tile, and what they have become."""
    for rows, tile in zip(features, expected, strict=True):
        assert (~rows[:, -1].isnan()).nonzero()[:, 0].tolist() == tile.tokens.tolist()
        assert torch.allclose(rows[tile.tokens], tile.features, atol=EXACT)


@contextmanager
def counting(model: PreTrainedModel) -> Iterator[list[int]]:
    """Rows of a tile, class token included, that the MLP of each layer works on."""
    seen: list[int] = []
    layers = model.model.vision_tower.encoder.layer
    hooks = [one.mlp.register_forward_pre_hook(lambda mlp, args: seen.append(args[0].shape[1])) for one in layers]
    yield seen
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("depth", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_kept_tokens_and_their_features_equal_the_oracle(tower: str, depth: float, attention: str) -> None:
    """Four tiles in one call, each as if it were alone; what left is gone from the layers behind."""
    model, pixels = deep(tower, attention), tiles()
    with llm_accel.apply(model, FlowCut(budget=5, tower_depth=depth)), counting(model) as seen:
        features = features_of(model, pixels)
    expected = [flowcut(model, one, 5, depth) for one in pixels]
    check(features, expected)
    longest = [max(tile.sizes[layer] for tile in expected) for layer in range(DEPTH)]
    assert seen == [1 + 64, *(1 + 4 * size for size in longest[:-1])]
    assert longest[-1] == 5 and (depth > 0.5 or longest[DEPTH // 2] == 5)


@pytest.mark.parametrize("tower", TOWERS)
def test_tokens_leave_step_by_step_and_tiles_at_their_own_pace(tower: str) -> None:
    """Otherwise the cases above would say nothing of a second cut among what a first one has left, and of padding."""
    model = deep(tower)
    sizes = [flowcut(model, one, 5).sizes for one in tiles()]
    assert all(len(set(one)) > 2 for one in sizes)
    assert any(len({one[layer] for one in sizes}) > 1 for layer in range(DEPTH))


def test_tokens_are_those_of_the_models_own_shuffle() -> None:
    """What the projector gets of a kept token is what it gets in the plain model where patches leave behind the last
    layer alone, but for what the last layer mixes: with attention to itself only, nothing."""
    model, pixels = deep(), tiles(2)
    for layer in model.model.vision_tower.encoder.layer:
        torch.nn.init.zeros_(layer.lambda_1)
    dense = features_of(model, pixels)
    with llm_accel.apply(model, FlowCut(budget=5, tower_depth=0.3)):
        features = features_of(model, pixels)
    kept = ~features[..., -1].isnan()
    assert kept.sum(-1).tolist() == [5, 5]
    assert torch.allclose(features[kept], dense[kept], atol=1e-5)


def test_larger_blocks() -> None:
    """A model that shuffles 4 x 4 patches into one token."""
    model, pixels = deep(ratio=0.25), tiles()
    with llm_accel.apply(model, FlowCut(budget=2)):
        features = features_of(model, pixels)
    assert features.shape[1] == 4
    check(features, [flowcut(model, one, 2) for one in pixels])
    dense = features_of(model, pixels)
    for method in ("stride_tokens", "visionzip", "downsample"):
        with llm_accel.apply(model, method, budget=1):
            stays = ~features_of(model, pixels)[..., -1].isnan()
        assert stays.shape == dense.shape[:2] and stays.sum(-1).tolist() == [1] * 4


def test_tiles_of_another_size_and_features_of_an_earlier_layer() -> None:
    """Positions are interpolated for 10 x 10 patches; layers behind the one whose output is used do not matter."""
    model, pixels = deep(), tiles(2, side=70)
    for used in (-1, -2, 3):
        with llm_accel.apply(model, FlowCut(budget=6)):
            features = features_of(model, pixels, vision_feature_layer=used)
        assert features.shape[1] == 25
        check(features, [flowcut(model, one, 6, used=used if used < 0 else used - DEPTH - 1) for one in pixels])


def by_hand(model: PreTrainedModel, batch: dict[str, Tensor], budget: int) -> tuple[Tensor, Tensor]:
    """For one row: logits of the plain model that gets the oracle's features, without the rows that left; and those
    features, as they enter the decoder."""
    found = [flowcut(model, one, budget) for one in batch["pixel_values"]]
    full = torch.zeros(len(found), 16, TEXT["hidden_size"])
    gone = torch.ones(len(found), 16, dtype=torch.bool)
    for tile, one in enumerate(found):
        full[tile, one.tokens], gone[tile, one.tokens] = one.features, False
    dropped = torch.zeros(batch["input_ids"].shape[1], dtype=torch.bool)
    dropped[batch["input_ids"][0] == IMAGE] = gone.flatten()
    with features_changed(model, lambda output: setattr(output, "pooler_output", full)):
        return removed(model, batch, dropped), torch.cat([one.features for one in found])


@pytest.mark.parametrize("scenes", [UNEQUAL, TILED], ids=["images", "tiles"])
def test_generation_equals_rows_removed_by_hand(scenes: tuple[Scene, ...]) -> None:
    """A left-padded batch whose rows have different numbers of images, or of tiles next to each other."""
    model, plain = deep(), deep()
    with llm_accel.apply(model, "flowcut", budget=3) as handle:
        _, logits = decode(model, inputs(model, scenes))
        report = handle.report()
    for row, scene in enumerate(scenes):
        assert torch.allclose(logits[row], by_hand(plain, inputs(plain, [scene]), 3)[0], atol=EXACT)
    images = sum(scene.images for scene in scenes)
    assert (report.visual_tokens_before, report.visual_tokens_after) == (16 * images, 3 * images)


def test_what_enters_the_decoder_beside_other_methods() -> None:
    """In the composition that the tests of two turns follow further on."""
    model, plain = deep(), deep()
    batch = inputs(model, UNEQUAL)
    with llm_accel.apply(model, ["flowcut:budget=3", "snapkv", "vhr"]):
        entering = Entering(model)
        decode(model, batch)
        entering.hook.remove()
    call = entering.calls[0]
    for row, scene in enumerate(UNEQUAL):
        features = by_hand(plain, inputs(plain, [scene]), 3)[1]
        index = call["index"][row]
        own, tokens = call["rows"][row][index >= 0], batch["input_ids"][row, index[index >= 0]]
        assert int((tokens != IMAGE).sum()) == sum(scene.text)
        assert torch.allclose(own[tokens == IMAGE], features, atol=EXACT)


def test_what_the_tower_attends_to_is_told_of_the_tokens_that_stay() -> None:
    """PAINT's marks where patches leave between the two layers that it looks at."""
    model, pixels = deep(), tiles()
    paint = PAINT(alpha=0.4, beta=0.2, local=0.3)
    with llm_accel.apply(model, [FlowCut(budget=9), paint]):
        output = model.model.get_image_features(pixel_values=pixels, return_dict=True)
    for marks, one in zip(output[MARKS], pixels, strict=True):
        tile = flowcut(model, one, 9)
        there = torch.zeros(16, dtype=torch.bool).index_fill(0, tile.tokens, True)
        assert torch.equal(marks, paint.tower_marks(*tile.paid, there))
    assert int(torch.stack(list(output[MARKS])).bool().sum()) > 4


def test_two_turns() -> None:
    """A second question on the pruned cache: its logits are those of the dialogue without the rows, by hand."""
    model, plain = deep(), deep()
    question = torch.randint(3, 100, (1, 5), generator=torch.Generator().manual_seed(9))
    batch = inputs(model, ONE)
    with llm_accel.apply(model, "flowcut", budget=3) as handle:
        cache = handle.new_cache()
        answer, _ = decode(model, batch, past_key_values=cache)
        ids = torch.cat([batch["input_ids"], answer, question], dim=1)
        again = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        _, logits = decode(model, again, past_key_values=cache)
    assert torch.allclose(logits[0], by_hand(plain, batch | again, 3)[0], atol=EXACT)


def test_nothing_to_cut_and_nothing_left_behind() -> None:
    model = deep()
    batch = inputs(model, UNEQUAL)
    dense, outside = decode(model, batch)[1], Outside.of(model)
    for options in ({"ratio": 1.0}, {"budget": 16}, {"budget": 99}):
        with llm_accel.apply(model, FlowCut(**options)):
            assert torch.equal(decode(model, batch)[1], dense)
    with llm_accel.apply(model, FlowCut(budget=1)):
        assert not torch.equal(decode(model, batch)[1], dense)
    assert Outside.of(model) == outside
    assert torch.equal(decode(model, batch)[1], dense)


@pytest.mark.parametrize("method", [FlowCut(budget=4, tower_stage="behind"), llm_accel.StrideTokens(budget=4)])
def test_behind_the_tower_it_runs_in_full(method: llm_accel.FlowCut | llm_accel.StrideTokens) -> None:
    """The deviation by name: all layers see all patches, kept features are those of the plain model."""
    model, pixels = deep(), tiles()
    dense = features_of(model, pixels)
    with llm_accel.apply(model, method), counting(model) as seen:
        features = features_of(model, pixels)
    kept = ~features[..., -1].isnan()
    assert seen == [65] * DEPTH
    assert kept.sum(-1).tolist() == [4] * 4 and torch.equal(features[kept], dense[kept])


def test_a_class_token_among_the_patches_is_refused() -> None:
    """3 x 5 patches and the class token would be 4 x 4, which the model shuffles; no token stands for a part then."""
    model = deep()
    pixels = torch.randn(1, 3, 21, 35)
    assert features_of(model, pixels, vision_feature_select_strategy="full").shape[1] == 4
    with llm_accel.apply(model, "flowcut", budget=1), pytest.raises(UnsupportedCallError, match="give 'default'"):
        features_of(model, pixels, vision_feature_select_strategy="full")


def test_units_are_what_the_model_shuffles() -> None:
    for ratio in (0.5, 0.25):
        model = deep(ratio=ratio)
        numbers = torch.arange(64.0)
        shuffled = model.model.pixel_shuffle(numbers.view(1, 8, 8, 1), scale_factor=ratio).flatten(1, 2)[0]
        (units,) = family_of(model, "flowcut").units(model.model, {}, [64])
        assert torch.equal(units.double(), shuffled.double())
