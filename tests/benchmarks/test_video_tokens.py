"""The benchmark of videos: what it draws, whose tower it runs, and that its figures are shares of the right patches."""

from __future__ import annotations

import numpy as np
import torch

import llm_accel
from benchmarks.video_tokens import FRAMES, METHODS, build_model, chosen, draw, kept_patches, pixels, table
from llm_accel.common.bundled import load_vision_model


def test_a_square_moves_and_nothing_else_does() -> None:
    clip = draw(np.random.default_rng(0))
    assert clip.frames.shape == (FRAMES, 80, 80, 3) and clip.moving.shape == (FRAMES, 100)
    change = np.abs(clip.frames[1:].astype(int) - clip.frames[:-1]).reshape(FRAMES - 1, 10, 8, 10, 8, 3).max((2, 4, 5))
    outside = ~(clip.moving[1:] | clip.moving[:-1])
    edges = 30  # a patch that the square hardly touches is not counted as covered
    assert (change.reshape(FRAMES - 1, 100)[outside] > edges).mean() < 0.1
    assert (change.reshape(FRAMES - 1, 100)[clip.moving[1:] ^ clip.moving[:-1]] > edges).mean() > 0.9


@torch.inference_mode()
def test_frames_go_through_the_bundled_tower() -> None:
    model, processor = build_model()
    values = pixels(processor, draw(np.random.default_rng(0)))
    bundled, _ = load_vision_model()
    rows = model.model.get_video_features(values, return_dict=True).pooler_output
    wanted = bundled.model.get_image_features(values[0], return_dict=True).pooler_output
    assert torch.allclose(rows.view(FRAMES, 101, -1)[:, 1:], torch.stack(list(wanted)), atol=1e-5)
    with llm_accel.apply(model, "evs", ratio=0.25):
        kept = kept_patches(model, values)
    assert kept[0].all() and kept.shape == (FRAMES, 100)


@torch.inference_mode()
def test_figures() -> None:
    found = chosen(1)
    assert tuple(found) == METHODS and all(0 <= share <= 1 for entry in found.values() for share in entry.values())
    assert found["evs"]["moving"] > found["random_tokens"]["moving"]
    seconds = {"dense": {"first_token": [3.0, 2.0, 4.0]}, "evs": {"first_token": [1.5, 1.0, 2.0]}}
    header, rows = table({"chosen": found, "seconds": seconds})
    assert len(header) == len(rows[0]) and rows[0][0] == "`evs`" and rows[0][-1] == "2.0" and rows[-1][-1] == ""
