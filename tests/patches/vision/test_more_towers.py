"""Families declared lately: patches are scored by a formula written down here anew, and each counts for the token that
the model itself makes of it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

import llm_accel
from llm_accel import UnsupportedCallError
from llm_accel.patches.families import attribute, family_of
from tests.patches.calls import Outside
from tests.tiny_vlm import IMAGE, decode
from tests.vision_oracle import removed
from tests.vlm_zoo import built, feature_rows, image_of, images_in, scene, scenes

EXACT = 2e-4
BLOCKS = ("idefics3", "smolvlm", "ovis2", "paddleocr_vl", "video_llama_3", "ernie4_5_vl_moe", "glm4v", "glm4v_moe")
BLOCKS += ("lfm2_vl", "glm_ocr", "glm46v", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen3_omni_moe")
NEW = (*BLOCKS, "qwen2_5_omni", "deepseek_vl", "janus", "llava_next_video")
VIDEOS = ("ernie4_5_vl_moe", "video_llama_3", "glm4v", "glm4v_moe", "qwen3_vl_moe", "llava_next_video")
VIDEOS += ("glm46v", "qwen3_5", "qwen3_5_moe", "qwen2_5_omni", "qwen3_omni_moe")


def tower_of(model: PreTrainedModel) -> tuple[Any, Any]:
    """The tower and its layers."""
    family = family_of(model, "flowcut")
    tower = attribute(model.base_model, family.tower)
    return tower, attribute(tower, family.blocks)


@contextmanager
def attending(tower: Any, attention: Callable[..., Any]) -> Iterator[None]:
    """Inside, the tower's attention is this one."""
    AttentionInterface.register("of_a_test", attention)
    configs = {id(part.config): part.config for part in tower.modules() if hasattr(part, "config")}
    before = [(config, config._attn_implementation) for config in configs.values()]
    for config in configs.values():
        config._attn_implementation_internal = "of_a_test"
    try:
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name


def itself(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: object, **kwargs: Any
) -> tuple[Tensor, None]:
    """No patch sees another one."""
    return value.transpose(1, 2), None


def video_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Two frames, or pairs of them."""
    family, generator = model.config.model_type, torch.Generator().manual_seed(3)
    if family == "llava_next_video":
        known = inspect.signature(model.base_model.get_video_features).parameters  # older versions: as for images
        name = "pixel_values_videos" if "pixel_values_videos" in known else "pixel_values"
        return {name: torch.randn(1, 2, 3, 28, 28, generator=generator)}
    image = image_of(model, 4)
    video = {"pixel_values_videos": torch.cat([image["pixel_values"]] * 2), "video_grid_thw": torch.tensor([[2, 4, 4]])}
    video["pixel_values_videos"] = torch.randn(video["pixel_values_videos"].shape, generator=generator)
    if family == "video_llama_3":
        video["video_merge_sizes"] = torch.tensor([2])
    return video


@torch.no_grad()
def rows(model: PreTrainedModel, call: dict[str, Tensor]) -> Tensor:
    """Features [tokens, C] of an image or a video."""
    if "pixel_values" in call and call["pixel_values"].shape[1:3] != (2, 3):  # which are frames
        return feature_rows(model, call)
    found = model.base_model.get_video_features(**call, return_dict=True).pooler_output
    return torch.cat([one.reshape(-1, one.shape[-1]) for one in found])


@pytest.mark.parametrize(("name", "video"), [(name, False) for name in NEW] + [(name, True) for name in VIDEOS])
def test_each_patch_counts_for_the_token_that_it_becomes(name: str, video: bool) -> None:
    model = built(name)
    family, holder = family_of(model, "flowcut"), model.base_model
    tower, blocks = tower_of(model)
    call = video_of(model) if video else image_of(model, 5)
    changed = [-1]

    def change(block: object, args: tuple[Any, ...]) -> tuple[Any, ...]:
        states = args[0].clone()
        patches = states[:, 1:] if family.class_token else states.view(-1, states.shape[-1])[None]
        if changed[0] >= 0:
            tile, patch = divmod(changed[0], patches.shape[1])
            patches[tile, patch] += torch.linspace(-9.0, 9.0, states.shape[-1])
        return (states, *args[1:])

    hook = blocks[0].register_forward_pre_hook(change)
    try:
        with attending(tower, itself):
            plain = rows(model, call)
            sizes = family.patches(holder, call, [plain])
            for patch in range(0, sum(sizes), 3):
                changed[0] = patch
                differs = ~torch.isclose(rows(model, call), plain, atol=1e-5).all(-1)
                ones = torch.zeros(sum(sizes), 1)
                ones[patch] = 1.0
                given = call | {"vision_feature_select_strategy": "default"} if name == "llava_next_video" else call
                packed = torch.cat(family.packed(holder, given, list(ones.split(sizes))))
                assert torch.equal(packed[:, 0].nan_to_num() > 0, differs), patch
    finally:
        hook.remove()


@pytest.mark.parametrize("name", [*BLOCKS, "deepseek_vl", "janus"])
def test_flowcut_keeps_the_best_by_the_formula(name: str) -> None:
    """What the mean query pays, mean over heads, times the L1 norm of the mean value; half of it new in each layer. All
    of them are looked at where patches leave behind the tower."""
    model = built(name)
    family, (tower, _) = family_of(model, "flowcut"), tower_of(model)
    image = image_of(model, 5)
    seen: list[tuple[Tensor, Tensor, Tensor, float]] = []

    def record(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: object, **kwargs: Any) -> Any:
        seen.append((query[0].double(), key[0].double(), value[0].double(), kwargs["scaling"]))
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=kwargs["scaling"])
        return output.transpose(1, 2), None

    with attending(tower, record):
        tokens = len(rows(model, image))
    score = torch.zeros(())
    for layer, (query, key, value, scaling) in enumerate(seen):
        paid = (query.mean(1, keepdim=True) @ key.mT * scaling).softmax(-1)[:, 0].mean(0)
        now = paid * value.mean(0).abs().sum(-1)
        score = now if layer == 0 else 0.5 * score + 0.5 * now
    (per_token,) = family.packed(model.base_model, image, [score[:, None]])
    budget = tokens // 2
    wanted = per_token[:, 0].topk(budget).indices.sort().values
    with llm_accel.apply(model, "flowcut", budget=budget, tower_stage="behind"):
        kept = (~rows(model, image)[:, -1].isnan()).nonzero()[:, 0]
    assert torch.equal(kept, wanted)


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("method", ["flowcut", "visionzip"])
def test_rows_and_undo(name: str, method: str) -> None:
    model = built(name)
    batch, alone = scenes(model)
    dense, outside = decode(model, batch)[1], Outside.of(model)
    with llm_accel.apply(model, method, ratio=1.0):
        assert torch.equal(decode(model, batch)[1], dense)
    with llm_accel.apply(model, method, ratio=0.5) as handle:
        logits = decode(model, copy.deepcopy(batch))[1]
        report = handle.report()
        for row, one in enumerate(alone):
            assert torch.allclose(logits[row], decode(model, one)[1][0], atol=EXACT)
        batch_rows = [feature_rows(model, images_in(one)) for one in alone]
    kept = sum(int((~one[:, -1].isnan()).sum()) for one in batch_rows)
    assert (report.visual_tokens_before, report.visual_tokens_after) == (sum(map(len, batch_rows)), kept)
    assert 0 < kept < sum(map(len, batch_rows))
    assert torch.equal(decode(model, batch)[1], dense) and Outside.of(model) == outside


@pytest.mark.parametrize("name", NEW)
def test_generation_equals_rows_removed_by_hand(name: str) -> None:
    """Behind the tower, where what stays is as it was; inside, see test_inside and test_packed."""
    model = built(name)
    one = scene(model)
    with llm_accel.apply(model, "flowcut", ratio=0.5, tower_stage="behind"):
        logits = decode(model, one)[1][0]
        features = feature_rows(model, images_in(one))
    dropped = torch.zeros(one["input_ids"].shape[1], dtype=torch.bool)
    dropped[one["input_ids"][0] == IMAGE] = features[:, -1].isnan()
    assert torch.allclose(logits, removed(model, one, dropped), atol=EXACT)


def padded(values: Tensor, like: Tensor) -> Tensor:
    """Zeros behind the second dimension, up to that of another tensor."""
    rest = (0, 0) * (values.ndim - 2)
    return F.pad(values, (*rest, 0, like.shape[1] - values.shape[1]))


@pytest.mark.parametrize("method", ["flowcut", "visionzip", "stride_tokens"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_padded_image_loses_what_it_loses_alone(attention: str, method: str) -> None:
    """A smaller image beside a larger one is filled up in the tower of LFM2-VL."""
    model = built("lfm2_vl")
    model.set_attn_implementation(attention)
    large, small = image_of(model, 5), image_of(model, 6)
    small = {name: value[:, :8] for name, value in small.items()} | {"spatial_shapes": torch.tensor([[2, 4]])}
    both = {name: torch.cat([large[name], padded(small[name], large[name])]) for name in large}
    outside = Outside.of(model)
    with llm_accel.apply(model, method, budget=1):
        together = rows(model, both)
        alone = torch.cat([rows(model, large), rows(model, small)])
    assert (~together[:, -1].isnan()).sum() == 2 and len(together) == 6
    assert torch.allclose(together, alone, atol=1e-5, equal_nan=True)
    assert Outside.of(model) == outside


def test_padding_inside_an_image_is_refused() -> None:
    model = built("idefics3")
    one = scene(model)
    mask = torch.ones(1, 1, 28, 28, dtype=torch.bool)
    mask[..., 14:] = False
    with llm_accel.apply(model, "flowcut", ratio=0.5):
        decode(model, one | {"pixel_attention_mask": torch.ones_like(mask)})
        with pytest.raises(UnsupportedCallError, match="the tower hides some of them from others"):
            decode(model, one | {"pixel_attention_mask": mask})
