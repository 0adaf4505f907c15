"""FlowCut inside towers whose images stand in one row: whole tokens leave half-way, and later layers compute less."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from transformers import PreTrainedModel

import llm_accel
from llm_accel import FlowCut
from llm_accel.patches.vision.tower import running_pass
from tests import tiny_vlm as tiny
from tests import vlm_others, vlm_towers
from tests.patches.calls import Outside
from tests.tiny_vlm import IMAGE, QWEN_MARKS, QWEN_VISION, UNEQUAL, decode, inputs, widened
from tests.tower_oracle import Kept, flowcut
from tests.vision_oracle import features_changed, removed
from tests.vlm_towers import LINEAR, MROPE

EXACT = 1e-3  # of values around 10
DEPTH = 7
GRIDS = ([1, 8, 12], [1, 6, 4], [1, 10, 6])
VISION = {**QWEN_VISION, "depth": DEPTH}
WIDE = {**VISION, "hidden_size": 32, "out_hidden_size": 32}
TOWERS = {
    "qwen2_5_vl": lambda: hf.Qwen2_5_VLConfig(
        vision_config={**WIDE, "fullatt_block_indexes": [1, 3, 5], "window_size": 84},
        text_config=tiny._mrope(),
        **QWEN_MARKS,
    ),
    "qwen3_5": lambda: hf.Qwen3_5Config(
        vision_config={**WIDE, "num_position_embeddings": 64},
        text_config={**tiny.TEXT, **LINEAR, "rope_parameters": MROPE | {"mrope_interleaved": True}},
        **QWEN_MARKS,
    ),
    "qwen2_vl": lambda: hf.Qwen2VLConfig(
        vision_config={**VISION, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
        text_config=tiny._mrope(),
        **QWEN_MARKS,
    ),
    "qwen3_vl": lambda: hf.Qwen3VLConfig(
        vision_config={**WIDE, "deepstack_visual_indexes": [0, 4], "num_position_embeddings": 64},
        text_config=tiny._mrope(mrope_interleaved=True),
        **QWEN_MARKS,
    ),
}


def glm(family: str) -> hf.PretrainedConfig:
    name, given = vlm_towers.TOWERS[family]
    return getattr(hf, f"{name}Config")(**given() | {"vision_config": given()["vision_config"] | {"depth": DEPTH}})


def thinker(family: str, **vision: Any) -> hf.PretrainedConfig:
    name, given = vlm_others.OTHERS[family]
    return getattr(hf, f"{name}Config")(**given() | {"vision_config": {**WIDE, **vision}})


ALIKE = {
    **TOWERS,
    "glm4v": lambda: glm("glm4v"),
    "glm_ocr": lambda: glm("glm_ocr"),
    "qwen2_5_omni": lambda: thinker("qwen2_5_omni", fullatt_block_indexes=[1, 3, 5], window_size=84),
    "qwen3_omni_moe": lambda: thinker("qwen3_omni_moe", deepstack_visual_indexes=[0, 4], num_position_embeddings=64),
}
every_tower = pytest.mark.parametrize("family", TOWERS)


def deep(family: str, attention: str = "sdpa", seed: int = 0) -> PreTrainedModel:
    """A tower of seven layers and attention to few patches, so that others leave step by step."""
    torch.manual_seed(seed)
    config = ALIKE[family]()
    kind = getattr(hf, f"{type(config).__name__.removesuffix('Config')}ForConditionalGeneration")
    model = widened(kind._from_config(config, attn_implementation=attention))
    with torch.no_grad():
        for name, weight in model.base_model.visual.blocks.named_parameters():
            if name.endswith(("qkv.weight", "attn.q.weight", "attn.k.weight", "attn.v.weight")):
                weight.mul_(2)
    return model


def images(grids=GRIDS, seed: int = 1) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    count = sum(t * h * w for t, h, w in grids)
    return {
        "pixel_values": torch.randn(count, 3 * 2 * 14 * 14, generator=draw),
        "image_grid_thw": torch.tensor([list(grid) for grid in grids]),
    }


@torch.no_grad()
def wanted(model: PreTrainedModel, call: dict[str, torch.Tensor], ratio: float, depth: float) -> list[list[Kept]]:
    grids = call["image_grid_thw"].tolist()
    pixels = call["pixel_values"].split([t * h * w for t, h, w in grids])
    return [
        flowcut(model.base_model.visual, one, grid, -(-int(grid[1] * grid[2] // 4 * ratio * 1e6) // 10**6), depth)
        for one, grid in zip(pixels, grids, strict=True)
    ]


@pytest.mark.parametrize("family", ALIKE)
@pytest.mark.parametrize("depth", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_kept_tokens_and_their_features_equal_the_oracle(family: str, depth: float, attention: str) -> None:
    """Images of unequal size in one call, each as if it were alone; what left is gone from the layers behind."""
    model, call = deep(family, attention), images()
    seen: list[int] = []
    blocks = model.base_model.visual.blocks
    hook = [block.norm2.register_forward_pre_hook(lambda norm, args: seen.append(len(args[0]))) for block in blocks]
    with llm_accel.apply(model, FlowCut(ratio=0.25, llm_stage="off", tower_depth=depth)):
        output = model.base_model.get_image_features(**call, return_dict=True)
    for one in hook:
        one.remove()
    expected = wanted(model, call, 0.25, depth)
    for features, (frame,) in zip(output.pooler_output, expected, strict=True):
        assert (~features[:, -1].isnan()).nonzero()[:, 0].tolist() == frame.tokens.tolist()
        assert torch.allclose(features[frame.tokens], frame.features, atol=EXACT)
    layers = [4 * sum(frame.sizes[layer] for (frame,) in expected) for layer in range(DEPTH)]
    assert seen == [len(call["pixel_values"]), *layers[:-1]] and layers[-1] < seen[0] / 3
    for level, deeper in enumerate(getattr(output, "deepstack_features", None) or ()):
        deeper = deeper if torch.is_tensor(deeper) else torch.cat(list(deeper))
        assert torch.allclose(deeper, torch.cat([frame.deeper[level] for (frame,) in expected]), atol=EXACT)


def test_tokens_leave_step_by_step() -> None:
    """Otherwise the cases above would say nothing about a second cut among the rows that a first one has left."""
    for family in TOWERS:
        model, call = deep(family), images()
        sizes = [frame.sizes for (frame,) in wanted(model, call, 0.25, 1.0)]
        assert any(len(set(one)) > 2 for one in sizes), family


@every_tower
def test_generation_equals_rows_removed_by_hand(family: str) -> None:
    """A left-padded batch, one image and two: logits are those of the plain decoder, which gets the oracle's features
    and no others."""
    model, plain = deep(family), deep(family)
    method = FlowCut(budget=2, llm_stage="off", tower_depth=0.5)
    with llm_accel.apply(model, method) as handle:
        _, logits = decode(model, inputs(model, UNEQUAL))
        report = handle.report()
    kept = 0
    for row, scene in enumerate(UNEQUAL):
        alone = inputs(plain, [scene])
        grids = alone["image_grid_thw"].tolist()
        with torch.no_grad():
            pixels = alone["pixel_values"].split([t * h * w for t, h, w in grids])
            frames = [
                flowcut(plain.base_model.visual, one, grid, 2, 0.5)[0] for one, grid in zip(pixels, grids, strict=True)
            ]
        totals = [grid[1] * grid[2] // 4 for grid in grids]
        full = [
            one.features.new_zeros(total, one.features.shape[1]).index_copy(0, one.tokens, one.features)
            for one, total in zip(frames, totals, strict=True)
        ]
        gone = torch.cat([~torch.isin(torch.arange(n), one.tokens) for one, n in zip(frames, totals, strict=True)])
        dropped = torch.zeros(alone["input_ids"].shape[1], dtype=torch.bool)
        dropped[alone["input_ids"][0] == IMAGE] = gone

        def replace(output, full=full, frames=frames):
            output.pooler_output = tuple(full)
            if getattr(output, "deepstack_features", None) is not None:
                levels = range(len(output.deepstack_features))
                deeper = [tuple(one.deeper[level] for one in frames) for level in levels]
                split = not torch.is_tensor(output.deepstack_features[0])  # newer versions split them by image
                output.deepstack_features = deeper if split else [torch.cat(one) for one in deeper]

        with features_changed(plain, replace):
            assert torch.allclose(logits[row], removed(plain, alone, dropped), atol=EXACT)
        kept += int((~gone).sum())
    assert report.visual_tokens_after == kept == 2 * sum(scene.images for scene in UNEQUAL)


@every_tower
def test_videos_lose_tokens_frame_by_frame(family: str) -> None:
    model, grid = deep(family), [3, 6, 8]
    pixels = torch.randn(3 * 48, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = flowcut(model.base_model.visual, pixels, grid, 4, 0.5)
    call = {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([grid])}
    with llm_accel.apply(model, FlowCut(ratio=1 / 3, llm_stage="off", tower_depth=0.5)):
        features = torch.cat(list(model.base_model.get_video_features(**call, return_dict=True).pooler_output))
    for rows, frame in zip(features.split(12), expected, strict=True):
        assert (~rows[:, -1].isnan()).nonzero()[:, 0].tolist() == frame.tokens.tolist()
        assert torch.allclose(rows[frame.tokens], frame.features, atol=EXACT)


@every_tower
def test_nothing_to_cut_and_nothing_left_behind(family: str) -> None:
    model = deep(family)
    batch = inputs(model, UNEQUAL)
    dense, outside = decode(model, batch)[1], Outside.of(model)
    for options in ({"ratio": 1.0}, {"budget": 99}):
        with llm_accel.apply(model, FlowCut(**options)):
            assert torch.equal(decode(model, batch)[1], dense)
    with llm_accel.apply(model, FlowCut(budget=1)):
        assert not torch.equal(decode(model, batch)[1], dense)
    assert Outside.of(model) == outside
    assert torch.equal(decode(model, batch)[1], dense)


@every_tower
def test_behind_the_tower_it_runs_in_full(family: str) -> None:
    """The deviation by name: all layers see all patches, kept features are those of the plain model."""
    model, call = deep(family), images()
    dense = model.base_model.get_image_features(**call, return_dict=True).pooler_output
    with llm_accel.apply(model, FlowCut(ratio=0.25, llm_stage="off", tower_stage="behind")):
        features = model.base_model.get_image_features(**call, return_dict=True).pooler_output
    for rows, full in zip(features, dense, strict=True):
        kept = ~rows[:, -1].isnan()
        assert int(kept.sum()) == -(-len(rows) // 4) and torch.equal(rows[kept], full[kept])


def test_images_in_one_call_of_varlen_attention() -> None:
    """FlashAttention gets all images at once, and where they end: they are scored one by one, and after a cut it is
    told where what is left of them ends."""
    model, call = deep("qwen2_5_vl"), images()
    bounds: list[list[int]] = []
    with llm_accel.apply(model, FlowCut(ratio=0.25, llm_stage="off", tower_depth=0.5)):
        expected = model.base_model.get_image_features(**call, return_dict=True).pooler_output
        for block in model.base_model.visual.blocks:
            block.attn.forward = Varlen(block.attn, bounds)
        features = model.base_model.get_image_features(**call, return_dict=True).pooler_output
        for block in model.base_model.visual.blocks:
            del block.attn.forward
    for rows, others in zip(features, expected, strict=True):
        assert torch.allclose(rows, others, atol=EXACT, equal_nan=True)
    assert bounds[1] == [0, 96, 120, 180] and bounds[-2][-1] == 4 * (6 + 2 + 4)


class Varlen:
    """An attention module's forward that calls the attention function once, as for FlashAttention, which a mask that
    hides other images stands in for."""

    def __init__(self, module, bounds: list[list[int]]) -> None:
        self.module, self.bounds = module, bounds

    def __call__(self, hidden, cu_seqlens, position_embeddings=None, **kwargs):
        module = self.module
        self.bounds.append(cu_seqlens.tolist())
        parts = module.qkv(hidden).reshape(len(hidden), 3, module.num_heads, -1).permute(1, 2, 0, 3)[:, None]
        cos, sin = position_embeddings

        def turned(states):
            first, second = states.chunk(2, dim=-1)
            return states * cos + torch.cat([-second, first], dim=-1) * sin

        query, key, value = turned(parts[0]), turned(parts[1]), parts[2]
        running_pass().see(query, key, value, module.scaling)
        image = torch.arange(len(cu_seqlens) - 1).repeat_interleave(cu_seqlens.diff().long())
        mask = (image[:, None] == image)[None, None]
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=module.scaling)
        return module.proj(output[0].transpose(0, 1).flatten(1))
