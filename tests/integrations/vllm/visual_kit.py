"""Prompts with images in vLLM and in transformers: scenes for the bundled model, noise for tiny ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import llm_accel
from llm_accel.common.bundled import vision_model_path
from llm_accel.eval.tasks.vision.examples import SceneSource
from llm_accel.registry import parse
from tests.integrations.vllm import tiny_vision

NEVER = [tiny_vision.IMAGE, tiny_vision.VIDEO, tiny_vision.START, tiny_vision.END, 2]
PLACEHOLDER = 4  # of the bundled model
NEW = 16
Prompts = Sequence[tuple[str, list[Image.Image]]]


@cache
def scenes(count: int = 4) -> list[tuple[str, list[Image.Image]]]:
    """All questions about so many scenes."""
    source = SceneSource(count, 0)
    found = [example for index in range(count) for example in source.examples(index)]
    return [(f"<image> {one.question}", [Image.fromarray(one.image)]) for one in found]


def in_transformers(
    folder: Path, prompts: Prompts, method: str | None, never: Sequence[int] = NEVER, **options: Any
) -> list[list[int]]:
    """What transformers answers; with ``never``, tokens that are not generated, every reply has the full length."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    if method is not None:
        llm_accel.apply(model, replace(parse(method), **options))
    whole = {"min_new_tokens": NEW, "suppress_tokens": list(never)} if never else {}
    found = []
    for text, images in prompts:
        batch = processor(text=[text], images=images, return_tensors="pt")
        out = model.generate(**batch, max_new_tokens=NEW, do_sample=False, **whole)
        found.append(out[0, batch["input_ids"].shape[1] :].tolist())
    return found


def in_vllm(
    llm: Any, prompts: Prompts, placeholder: int = tiny_vision.IMAGE, never: Sequence[int] = NEVER
) -> tuple[list[list[int]], list[int]]:
    """What vLLM answers, and the placeholders of images in each prompt."""
    from vllm import SamplingParams

    bias = dict.fromkeys(never, -100.0)
    whole = {"min_tokens": NEW, "ignore_eos": True, "logit_bias": bias} if never else {}
    sampling = SamplingParams(temperature=0, max_tokens=NEW, **whole)
    given = [{"prompt": text, "multi_modal_data": {"image": images}} for text, images in prompts]
    done = llm.generate(given, sampling, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in done], [one.prompt_token_ids.count(placeholder) for one in done]


def scenes_in_transformers(method: str | None, count: int = 4) -> list[list[int]]:
    """What the bundled model answers about scenes."""
    options = {} if method is None else {"positions": "compact"}
    return in_transformers(vision_model_path(), scenes(count), method, never=(), **options)


def scenes_in_vllm(llm: Any, count: int = 4) -> tuple[list[list[int]], list[int]]:
    """As :func:`in_vllm`, about scenes."""
    return in_vllm(llm, scenes(count), PLACEHOLDER, never=())


def limits(method: str | None) -> dict[str, Any]:
    """Two images; no video, which engines with a method have not anyway."""
    return {"limit_mm_per_prompt": {"image": 2} | ({"video": 0} if method is None else {})}


def check_videos_are_refused(llm: Any, family: str) -> None:
    """A request that comes with a video of two frames."""
    from vllm.exceptions import VLLMValidationError

    text = f"w5 {next(name for name, token in tiny_vision.special(family).items() if token == tiny_vision.VIDEO)} w6"
    frames = np.zeros((2, 56, 56, 3), dtype=np.uint8)
    told = {"fps": 2.0, "duration": 1.0, "total_num_frames": 2, "frames_indices": [0, 1], "do_sample_frames": False}
    video = [(frames, told)] if family.startswith("qwen") else frames
    with pytest.raises(VLLMValidationError, match=r"(?i)at most 0 video"):
        llm.generate([{"prompt": text, "multi_modal_data": {"video": video}}], use_tqdm=False)
