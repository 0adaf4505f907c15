"""EVS and VidCom2 on whole models: what reaches the language model of a video is what the method keeps of its frames,
and the rest equals rows that were taken out by hand. Images are left alone."""

from __future__ import annotations

import pytest
import torch

import llm_accel
from llm_accel import EVS, SnapKV, UnsupportedModelError, VidCom2
from llm_accel.methods import VideoTokens
from tests.patches.calls import Outside
from tests.patches.vision.test_more_towers import VIDEOS as MORE
from tests.patches.vision.test_more_towers import rows, video_of
from tests.tiny_vlm import ONE, UNEQUAL, VIDEO, VIDEOS, decode, features, frames, inputs, tiny_vlm
from tests.vision_oracle import removed
from tests.vlm_zoo import built

EXACT = 2e-4
METHODS = (EVS(ratio=0.5), VidCom2(ratio=0.5))
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


def expected(whole: torch.Tensor, patch: torch.Tensor, times: int, method: VideoTokens) -> torch.Tensor:
    """Which rows of the features of one video stay; ``patch``: which of them are patches."""
    stay = torch.ones_like(patch)
    stay[patch] = method.keep(whole[patch].view(times, int(patch.sum()) // times, -1)).flatten()
    return stay


@every_method
@pytest.mark.parametrize("family", VIDEOS)
def test_rows_equal_those_taken_out_by_hand(family: str, method: VideoTokens) -> None:
    """Two videos in one row, one in another: each is judged alone, padded or not; undo is exact."""
    model = tiny_vlm(family)
    batch = inputs(model, UNEQUAL, video=True)
    dense, outside = decode(model, batch)[1], Outside.of(model)
    with llm_accel.apply(model, method) as handle:
        _, logits = decode(model, batch)
        report = handle.report()
    before = after = 0
    for row, scene in enumerate(UNEQUAL):
        alone = inputs(model, [scene], video=True)
        tokens = (alone["input_ids"][0] == VIDEO).nonzero()[:, 0]
        gone = torch.zeros_like(alone["input_ids"][0], dtype=torch.bool)
        start = 0
        for place in range(scene.images):
            whole = features(model, frames(family, 10 * scene.seed + place)).detach()
            patch = torch.ones(len(whole), dtype=torch.bool)
            patch[len(whole) // 3 * 3 :] = False  # a newline behind the last frame
            gone[tokens[start : start + len(whole)]] = ~expected(whole, patch, 3, method)
            start += len(whole)
        before, after = before + len(tokens), after + len(tokens) - int(gone.sum())
        reference = removed(model, alone, gone)
        assert torch.allclose(logits[row], reference, atol=EXACT), (logits[row] - reference).abs().max()
    assert (report.visual_tokens_before, report.visual_tokens_after) == (before, after) and after < before
    assert Outside.of(model) == outside and torch.equal(decode(model, batch)[1], dense)


@every_method
@pytest.mark.parametrize("name", MORE)
def test_videos_of_other_families(name: str, method: VideoTokens) -> None:
    """Two frames, or one token of both: then the video is a single frame."""
    model = built(name)
    video = video_of(model)
    whole = rows(model, video)
    with llm_accel.apply(model, method):
        kept = ~rows(model, video)[:, -1].isnan()
    times = 1 if name == "ernie4_5_vl_moe" else 2
    assert kept.tolist() == expected(whole, torch.ones_like(kept), times, method).tolist()
    assert int(kept.sum()) == method.total(times, len(whole) // times)


def test_frames_of_a_video_lose_what_they_lose_alone() -> None:
    """In LLaVA-NeXT-Video, some versions of which return the frames of a video apart."""
    model = built("llava_next_video")
    (pixels,) = video_of(model).values()

    def encoded(frames: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            found = model.base_model.get_video_features(frames, return_dict=True).pooler_output
        return torch.cat([one.reshape(-1, one.shape[-1]) for one in found])

    with llm_accel.apply(model, "flowcut", budget=1):
        together = encoded(pixels)
        alone = [encoded(pixels[:, frame : frame + 1]) for frame in range(pixels.shape[1])]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5, equal_nan=True)
    assert (~together[:, -1].isnan()).sum() == 2


@every_method
@pytest.mark.parametrize("family", VIDEOS)
def test_images_keep_all_tokens(family: str, method: VideoTokens) -> None:
    model = tiny_vlm(family)
    batch = inputs(model, UNEQUAL)
    dense = decode(model, batch)[1]
    with llm_accel.apply(model, method) as handle:
        assert torch.equal(decode(model, batch)[1], dense)
        report = handle.report()
    assert report.visual_tokens_after == report.visual_tokens_before > 0
    assert any("only tokens of videos beyond the budget leave" in warning for warning in report.warnings)


@every_method
def test_nothing_to_drop_and_what_is_evicted_behind(method: VideoTokens) -> None:
    model = tiny_vlm("qwen2_5_vl")
    batch = inputs(model, ONE, video=True)
    dense = decode(model, batch)[1]
    with llm_accel.apply(model, type(method)(ratio=1.0)):
        assert torch.equal(decode(model, batch)[1], dense)
    with llm_accel.apply(model, [method, SnapKV(budget=12, window=4)]) as handle:
        decode(model, batch)
        assert all(layer.evicted for layer in handle.report().layers)


@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl"])
def test_models_without_frames_are_refused(family: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"compares the frames of a video, not in {family}, which has no"):
        llm_accel.apply(tiny_vlm(family), "evs")


def test_a_family_that_is_not_declared_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="exaone4_5, whose family is not among the tested"):
        llm_accel.apply(built("exaone4_5"), "vidcom2")
