"""Which tokens of a video stay, and what that costs: things that stand still and one that moves, drawn, eight frames.

    python -m benchmarks.video_tokens --out benchmarks/results/video_tokens_cpu.json

The tower and the projector are those of the bundled vision model, which was trained on such scenes, in the shape of
Video-LLaVA: 100 patches and a class token per frame. No decoder here was trained on videos, so **nothing is asked**:
the figures say which patches reach it, not what it would answer.

- ``moving``: share of the patches under the moving thing that stay, in the frames after the first.
- ``still``: share of the patches under things that stand still that stay in at least one frame.
- ``repeated``: share of the kept tokens, in the frames after the first, that lie where nothing has changed.

Seconds are CPU time of one thread to the first token, with random weights: a decoder of 8 layers, hidden 1024, behind
the same tower; ``encode`` is the part until the features are there, selection included. Medians, least and most.
"""

from __future__ import annotations

import argparse
import statistics
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import LlamaConfig, VideoLlavaConfig, VideoLlavaForConditionalGeneration

import llm_accel
from benchmarks.common import conditions, cpu_seconds, publish
from llm_accel.common.bundled import load_vision_model
from llm_accel.eval.tasks.vision.generators import covered
from llm_accel.eval.tasks.vision.scenes import SIZE, draw_scene

FRAMES, SIDE, TEXT, VIDEO = 8, 10, 40, 6
RATIO = 0.25
NAMES = ("kept", "moving", "still", "repeated")
METHODS = ("evs", "vidcom2", "flowcut", "visionzip", "stride_tokens", "random_tokens")
Patches = npt.NDArray[np.bool_]


class Clip(NamedTuple):
    """A video, uint8 [T, H, W, 3]; patches under the moving thing, [T, 100], and under what stands still, [100]."""

    frames: npt.NDArray[np.uint8]
    moving: Patches
    still: Patches


def draw(rng: np.random.Generator) -> Clip:
    """A scene with one to three things, a little noise in each frame, and a square that crosses it."""
    scene = draw_scene(rng, int(rng.integers(1, 4)))
    colour = rng.uniform(60, 255, 3)
    place, step = rng.uniform(0, 12, 2), rng.uniform(4, 7, 2)
    frames, moving = [], []
    for time in range(FRAMES):
        image, mask = scene.image.astype(float), np.zeros((SIZE, SIZE), bool)
        top, left = (int(at) for at in place + time * step)
        mask[top : top + 14, left : left + 14] = True
        image[mask] = colour
        image += rng.normal(0, 2, image.shape)
        frames.append(np.round(np.clip(image, 0, 255)).astype(np.uint8))
        moving.append(covered(mask, SIDE, SIDE).ravel())
    return Clip(np.stack(frames), np.stack(moving), scene.patches.ravel())


def build_model(decoder: LlamaConfig | None = None) -> tuple[VideoLlavaForConditionalGeneration, Any]:
    """Video-LLaVA with the bundled tower, and the bundled processor; ``decoder``: random weights of this shape, in
    place of the bundled ones."""
    bundled, processor = load_vision_model()
    text = bundled.config.text_config if decoder is None else decoder
    config = VideoLlavaConfig(
        vision_config=bundled.config.vision_config,
        text_config=text,
        image_token_index=5,
        video_token_index=VIDEO,
        vision_feature_layer=bundled.config.vision_feature_layer,
        projector_hidden_act=bundled.config.projector_hidden_act,
    )
    torch.manual_seed(0)
    model = VideoLlavaForConditionalGeneration(config).eval()
    weights = bundled.model.state_dict()
    seeing = {name.removeprefix("vision_tower"): value for name, value in weights.items() if "vision_tower" in name}
    towers = {f"{tower}_tower{name}": value for tower in ("image", "video") for name, value in seeing.items()}
    own = {} if decoder is not None else {name: one for name, one in weights.items() if "vision_tower" not in name}
    model.model.load_state_dict(towers | own, strict=False)
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = [VIDEO]
    return model, processor


def pixels(processor: Any, clip: Clip) -> Tensor:
    """fp32 [1, T, 3, H, W] as the model takes a video."""
    values: Tensor = processor.image_processor(images=list(clip.frames), return_tensors="pt")["pixel_values"]
    return values[None]


def kept_patches(model: Any, values: Tensor) -> Patches:
    """Which patches of each frame reach the decoder, [T, 100], with the method that is applied."""
    rows: Tensor = model.model.get_video_features(values, return_dict=True).pooler_output
    stay: Patches = (~rows[..., -1].isnan()).view(FRAMES, -1)[:, 1:].numpy()  # the first is the class token
    return stay


def chosen(clips: int) -> dict[str, dict[str, float]]:
    """What each method keeps, means over the clips."""
    model, processor = build_model()
    found: dict[str, list[tuple[float, ...]]] = {method: [] for method in METHODS}
    for number in range(clips):
        clip = draw(np.random.default_rng((7, number)))
        values = pixels(processor, clip)
        changed = clip.moving[1:] | clip.moving[:-1]
        for method in METHODS:
            with llm_accel.apply(model, method, ratio=RATIO):
                stay = kept_patches(model, values)
            later = stay[1:]
            own = clip.still & ~clip.moving.any(0)
            found[method].append(
                (
                    float(stay.mean()),
                    float(later[clip.moving[1:]].mean()),
                    float(stay.any(0)[own].mean()) if own.any() else float("nan"),
                    float((later & ~changed).sum() / max(1, later.sum())),
                )
            )
    return {
        method: {
            name: round(float(np.nanmean(column)), 4)
            for name, column in zip(NAMES, zip(*rows, strict=True), strict=True)
        }
        for method, rows in found.items()
    }


def times(repeats: int) -> dict[str, Any]:
    """Time to the first token and of the features, dense and with each method that looks at frames or at the tower."""
    wide = LlamaConfig(vocab_size=1024, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16)  # fmt: skip # noqa: E501
    model, processor = build_model(wide)
    values = pixels(processor, draw(np.random.default_rng(0)))
    text = torch.randint(10, 1024, (1, TEXT), generator=torch.Generator().manual_seed(1))
    ids = torch.cat([text, torch.full((1, FRAMES * (SIDE * SIDE + 1)), VIDEO), text[:, :8]], dim=1)
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": values}
    measured: dict[str, dict[str, list[float]]] = {}
    for _ in range(repeats):
        for method in ("dense", *METHODS[:3]):
            own = measured.setdefault(method, {"first_token": [], "encode": []})
            with nullcontext() if method == "dense" else llm_accel.apply(model, method, ratio=RATIO):
                generate = cpu_seconds(lambda: model.generate(**prompt, max_new_tokens=1, do_sample=False))
                own["first_token"].append(generate[0])
                own["encode"].append(cpu_seconds(lambda: model.model.get_video_features(values, return_dict=True))[0])
    return {
        method: {name: [statistics.median(took), min(took), max(took)] for name, took in own.items()}
        for method, own in measured.items()
    }


def table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows for the guide."""
    rows = []
    for method, entry in result["chosen"].items():
        took = result["seconds"].get(method)
        speed = "" if took is None else f"{result['seconds']['dense']['first_token'][0] / took['first_token'][0]:.1f}"
        rows.append([f"`{method}`", *(f"{entry[name]:.2f}" for name in NAMES), speed])
    return ["", *NAMES, "times as fast to the first token"], rows


@torch.inference_mode()
def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    about = conditions(model="bundled tower; decoder of the times: random weights", frames=FRAMES, ratio=RATIO)
    publish({**about, "clips": args.clips, "chosen": chosen(args.clips), "seconds": times(args.repeats)}, args.out)


if __name__ == "__main__":
    main()
