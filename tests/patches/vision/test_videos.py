"""Videos: each frame, or pair of frames that the tower takes together, is an image of its own with its own budget."""

from __future__ import annotations

import inspect

import pytest
import torch

import llm_accel
from llm_accel import Downsample, FlowCut, RandomTokens, VisionZip
from tests.patches.calls import Outside
from tests.tiny_vlm import UNEQUAL, VIDEOS, decode, features, frames, inputs, tiny_vlm
from tests.vision_oracle import flowcut

EXACT = 2e-4


@pytest.mark.parametrize("family", VIDEOS)
@pytest.mark.parametrize("method", [FlowCut(budget=2), VisionZip(dominant=1, contextual=1)])
def test_frames_are_images_of_their_own(family: str, method: object) -> None:
    """Each frame keeps its budget; a row of a batch gets what it gets alone; nothing is left behind."""
    model = tiny_vlm(family)
    video, batch = frames(family, 1), inputs(model, UNEQUAL, video=True)
    outside, dense = Outside.of(model), decode(model, batch)[1]
    with llm_accel.apply(model, method):
        kept = ~features(model, video)[:, -1].isnan()
        assert kept[: len(kept) // 3 * 3].view(3, -1).sum(-1).tolist() == [2, 2, 2]
        _, logits = decode(model, batch)
        for row, scene in enumerate(UNEQUAL):
            alone = decode(model, inputs(model, [scene], video=True))[1]
            assert torch.allclose(logits[row], alone[0], atol=EXACT)
    assert not torch.equal(logits, dense)
    assert Outside.of(model) == outside
    assert torch.equal(decode(model, batch)[1], dense)


def test_patches_of_frames_equal_the_published_procedure() -> None:
    """Video-LLaVA: the class token of a frame is one of its tokens, and of its budget."""
    model = tiny_vlm("video_llava")
    video = frames("video_llava", 2)
    wanted = [flowcut(model, frame, 4, tower_name="video_tower")[0] for frame in video["pixel_values_videos"][0]]
    with llm_accel.apply(model, "flowcut", budget=5):
        kept = ~features(model, video)[:, -1].isnan()
    for row, patches in zip(kept.view(3, 17), wanted, strict=True):
        assert row.nonzero()[:, 0].tolist() == [0, *(1 + patches).tolist()]


@pytest.mark.parametrize("family", ["video_llava", "qwen2_5_vl"])
def test_smaller_frames(family: str) -> None:
    """Each frame equals the same frame alone."""
    model = tiny_vlm(family)
    video = frames(family, 1)
    with llm_accel.apply(model, Downsample(budget=1)):
        whole = features(model, video).view(3, -1, 32)
        for frame in range(3):
            if family == "video_llava":
                alone = {"pixel_values_videos": video["pixel_values_videos"][:, frame : frame + 1]}
            else:
                patches = video["pixel_values_videos"].view(3, 16, -1)[frame]
                alone = {"pixel_values_videos": patches, "video_grid_thw": torch.tensor([[1, 4, 4]])}
            assert torch.allclose(features(model, alone), whole[frame], atol=1e-5, equal_nan=True)
    kept = ~whole[..., -1].isnan()
    assert kept.sum(-1).tolist() == ([2] * 3 if family == "video_llava" else [1] * 3)  # with the class token


@pytest.mark.parametrize("newline", ["drop", "keep"])
def test_the_newline_behind_a_video(newline: str) -> None:
    model = tiny_vlm("llava_onevision")
    with llm_accel.apply(model, RandomTokens(budget=2, newline=newline)):
        kept = ~features(model, frames("llava_onevision", 1))[:, -1].isnan()
    added_later = "pixel_values_videos" not in inspect.signature(model.base_model.get_video_features).parameters
    assert len(kept) == 13 and bool(kept[-1]) == (newline == "keep" or added_later)
