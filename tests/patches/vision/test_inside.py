"""FlowCut inside the towers of families without a class token that are neither Qwen's nor built like it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import llm_accel
from llm_accel import FlowCut, UnsupportedCallError
from llm_accel.patches.families import attribute, family_of
from tests.row_oracle import Rows, taking
from tests.tiny_vlm import IMAGE, decode
from tests.vision_oracle import features_changed, removed
from tests.vlm_zoo import CONFIGS, built, feature_rows, images_in, scenes

EXACT = 1e-3  # of values around 10
DEPTH = 7
GRIDS = ([1, 8, 12], [1, 6, 4], [1, 10, 6])
TILES = ("deepseek_vl", "janus", "idefics3", "smolvlm", "ovis2")
PACKED = ("paddleocr_vl", "video_llama_3", "ernie4_5_vl_moe")
every_tower = pytest.mark.parametrize("name", [*TILES, *PACKED])


def deep(name: str, side: int = 56) -> PreTrainedModel:
    """A tower of seven layers with attention to few patches, 7 pixels wide in tiles of ``side`` pixels."""
    vision = CONFIGS[name][1]()["vision_config"]
    layers = "depth" if "depth" in vision else "num_hidden_layers"
    tile = {"image_size": side} if name in TILES else {}
    tile |= {"hidden_stride": 2} if name == "ovis2" else {}
    model = built(name, vision_config={**vision, layers: DEPTH, **tile})
    with torch.no_grad():
        for label, weight in parts(model)[0].named_parameters():
            if label.endswith(("q_proj.weight", "qkv.weight")):
                weight.mul_(3)
    return model


def parts(model: PreTrainedModel) -> tuple[Any, Any]:
    """The tower and its layers."""
    family = family_of(model, "flowcut")
    tower = attribute(model.base_model, family.tower)
    return tower, attribute(tower, family.blocks)


def images_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Three images: of one size, or of the sizes of GRIDS, one with a token for each patch where a call says so."""
    name, draw = model.config.model_type, torch.Generator().manual_seed(1)
    if name in TILES:
        pixels = torch.randn(3, 3, 56, 56, generator=draw)
        return {"pixel_values": pixels[None] if name in ("idefics3", "smolvlm") else pixels}
    count = sum(rows * columns for _, rows, columns in GRIDS)
    shape = (3, 14, 14) if name == "paddleocr_vl" else (3 * 14 * 14,)
    call = {"pixel_values": torch.randn(count, *shape, generator=draw), "image_grid_thw": torch.tensor(GRIDS)}
    return call | ({"image_merge_sizes": torch.tensor([2, 1, 2])} if name == "video_llama_3" else {})


def alone(call: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The call of each image."""
    pixels = call["pixel_values"]
    if "image_grid_thw" not in call:
        ones = pixels[0] if pixels.ndim == 5 else pixels
        return [{"pixel_values": one[None, None] if pixels.ndim == 5 else one[None]} for one in ones]
    ones = pixels.split(call["image_grid_thw"].prod(-1).tolist())
    others = {name: value for name, value in call.items() if name != "pixel_values"}
    return [
        {"pixel_values": one, **{name: value[at : at + 1] for name, value in others.items()}}
        for at, one in enumerate(ones)
    ]


def units_of(model: PreTrainedModel, call: dict[str, Tensor]) -> list[list[int]]:
    """Patches of each token of the one image of a call, written down by hand."""
    name = model.config.model_type
    tile = call["pixel_values"].shape[-1] // 7
    rows, columns = call["image_grid_thw"][0, 1:].tolist() if name in PACKED else (tile, tile)
    if name in ("deepseek_vl", "janus") or int(call.get("image_merge_sizes", [2])[0]) == 1:
        return [[patch] for patch in range(rows * columns)]
    if name in ("video_llama_3", "ernie4_5_vl_moe"):  # which follow one another
        return [list(range(first, first + 4)) for first in range(0, rows * columns, 4)]
    corners = [(row, column) for row in range(0, rows, 2) for column in range(0, columns, 2)]
    return [[columns * (row + down) + column + right for down in (0, 1) for right in (0, 1)] for row, column in corners]


def by_hand(model: PreTrainedModel, call: dict[str, Tensor], share: float, depth: float) -> tuple[Rows, Tensor]:
    """One image of the plain model: what was left of it, and features [tokens, C], some of them of nothing."""
    tower, blocks = parts(model)
    units = units_of(model, call)
    latest = len(blocks) - (1 if model.config.model_type in PACKED else 2)
    last = min(latest, max(-int(-depth * len(blocks) // 1) - 1, 0))
    rows = Rows(units, -(-int(len(units) * share * 1e6) // 10**6), last)
    with taking(tower, blocks, rows):
        return rows, feature_rows(model, call)


@every_tower
@pytest.mark.parametrize(("depth", "attention"), [(1.0, "sdpa"), (0.4, "sdpa"), (1.0, "eager")])
def test_kept_tokens_and_their_features_equal_the_oracle(name: str, depth: float, attention: str) -> None:
    """Three images in one call, each as if it were alone; what left is gone from the layers behind."""
    model = deep(name)
    model.set_attn_implementation(attention)
    call, seen = images_of(model), []
    linear = [getattr(block, "mlp", None) or block.ffn for block in parts(model)[1]]
    hooks = [one.register_forward_pre_hook(lambda mlp, args: seen.append(args[0].shape[-2])) for one in linear]
    with llm_accel.apply(model, FlowCut(ratio=0.25, llm_stage="off", tower_depth=depth)):
        features = feature_rows(model, call)
    for hook in hooks:
        hook.remove()
    expected = [by_hand(model, one, 0.25, depth) for one in alone(call)]
    for found, (rows, wanted) in zip(features.split([len(one) for _, one in expected]), expected, strict=True):
        assert (~found[:, -1].isnan()).nonzero()[:, 0].tolist() == rows.kept
        assert torch.allclose(found[rows.kept], wanted[rows.kept], atol=EXACT)
    joined: Callable[[list[int]], int] = sum if name in PACKED else max
    layers = [joined([rows.sizes[layer] for rows, _ in expected]) for layer in range(DEPTH)]
    assert seen[1:] == layers[:-1] and layers[-1] < seen[0] / 3


@every_tower
def test_tokens_leave_step_by_step(name: str) -> None:
    """Otherwise the cases above would say nothing about a second cut among the rows that a first one has left."""
    model = deep(name)
    sizes = [by_hand(model, one, 0.25, 1.0)[0].sizes for one in alone(images_of(model))]
    assert any(len(set(one)) > 2 for one in sizes)


@every_tower
def test_generation_equals_rows_removed_by_hand(name: str) -> None:
    """A left-padded batch: logits are those of the plain decoder, which gets the oracle's features and no others."""
    model, plain = deep(name, side=28), deep(name, side=28)
    batch, ones = scenes(model)
    with llm_accel.apply(model, FlowCut(ratio=0.25, llm_stage="off")):
        logits = decode(model, batch)[1]
    for row, one in enumerate(ones):
        rows, features = by_hand(plain, images_in(one), 0.25, 1.0)
        dropped = torch.zeros(one["input_ids"].shape[1], dtype=torch.bool)
        gone = torch.ones(len(features), dtype=torch.bool).index_fill(0, torch.tensor(rows.kept), False)
        dropped[one["input_ids"][0] == IMAGE] = gone

        def replace(output: Any, features: Tensor = features) -> None:
            shape = output.pooler_output
            output.pooler_output = features.view_as(shape) if torch.is_tensor(shape) else (features,)

        with features_changed(plain, replace):
            assert torch.allclose(logits[row], removed(plain, one, dropped), atol=EXACT)


def test_patches_that_are_left_over_are_refused() -> None:
    """Transformers pads such images along the wrong dimensions and fails."""
    model = deep("ovis2", side=35)
    with (
        llm_accel.apply(model, FlowCut(budget=4)),
        pytest.raises(UnsupportedCallError, match="25 patches in lines of 5 do not make whole blocks of 2 x 2"),
    ):
        feature_rows(model, {"pixel_values": torch.zeros(1, 3, 35, 35)})


def test_videos_whose_frames_are_paired_leave_behind_the_tower() -> None:
    """ERNIE 4.5 VL: one token is of two frames, which do not see each other in the tower."""
    model = deep("ernie4_5_vl_moe")
    pixels = torch.randn(2 * 48, 3 * 14 * 14, generator=torch.Generator().manual_seed(1))
    call = {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([[2, 6, 8]])}
    dense = torch.cat(list(model.model.get_video_features(**call, return_dict=True).pooler_output))
    with llm_accel.apply(model, FlowCut(budget=4, llm_stage="off")):
        features = torch.cat(list(model.model.get_video_features(**call, return_dict=True).pooler_output))
    kept = ~features[:, -1].isnan()
    assert len(dense) == 12 and int(kept.sum()) == 4 and torch.equal(features[kept], dense[kept])


def test_videos_lose_tokens_frame_by_frame() -> None:
    """VideoLLaMA 3."""
    model = deep("video_llama_3")
    pixels = torch.randn(3 * 48, 3 * 14 * 14, generator=torch.Generator().manual_seed(1))
    call = {"video_grid_thw": torch.tensor([[3, 6, 8]]), "video_merge_sizes": torch.tensor([2])}
    with llm_accel.apply(model, FlowCut(budget=4, llm_stage="off")):
        output = model.model.get_video_features(pixel_values_videos=pixels, **call, return_dict=True)
    for found, frame in zip(torch.cat(list(output.pooler_output)).split(12), pixels.split(48), strict=True):
        image = {"image_grid_thw": torch.tensor([[1, 6, 8]]), "image_merge_sizes": torch.tensor([2])}
        rows, wanted = by_hand(model, {"pixel_values": frame, **image}, 1 / 3, 1.0)
        assert (~found[:, -1].isnan()).nonzero()[:, 0].tolist() == rows.kept
        assert torch.allclose(found[rows.kept], wanted[rows.kept], atol=EXACT)
