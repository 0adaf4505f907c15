"""Samples: images with prompts, from a file or drawn, and what a processor makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count, cycle
from pathlib import Path
from typing import Any

import numpy as np

from llm_accel.calibrate.dyvte.runs import Sample
from llm_accel.errors import ConfigError
from llm_accel.eval.rows import read_file
from llm_accel.eval.tasks.vision.processor import VisionProcessor
from llm_accel.eval.tasks.vision.questions import TASKS, questions
from llm_accel.eval.tasks.vision.scenes import SPLITS, draw_scene
from llm_accel.eval.tasks.vision.sources import open_image

_FORM = 'JSON lines: {"image": PATH, "prompt": TEXT, "answer": TEXT}, the answer may be left out'

APART = 2**20  # first word of the seed of scenes; training and evaluation begin theirs with small numbers


@dataclass(frozen=True)
class Pair:
    """One image (a path, a PIL image or uint8 [H, W, 3]) and prompt; ``answer`` None asks for the model's own."""

    image: Any
    prompt: str
    answer: str | None = None


def read_pairs(path: str) -> list[Pair]:
    """The pairs of a file; image paths are relative to it.

    Raises:
        ConfigError: no such file, or a row that is no pair.
    """
    file, pairs = Path(path).expanduser(), []
    for number, row in enumerate(read_file(file, "--data", _FORM), start=1):
        try:
            image, prompt, answer = row["image"], row["prompt"], row.get("answer")
            if not (isinstance(image, str) and isinstance(prompt, str) and isinstance(answer, str | None)):
                raise TypeError("image, prompt and answer are texts")
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"--data {path!r}, row {number}: {error!r}; give {_FORM}.") from error
        pairs.append(Pair(str(file.parent / image), prompt, answer))
    if not pairs:
        raise ConfigError(f"--data {path!r} is empty; give {_FORM}.")
    return pairs


def scene_pairs(number: int, seed: int) -> Iterator[Pair]:
    """``number`` questions, each about a scene of its own; tasks take turns, and so do sparse and crowded scenes. The
    model answers them itself."""
    found = 0
    turns = cycle([(task, split) for split in SPLITS for task in TASKS])
    for sample, (task, split) in zip(count(), turns, strict=False):
        if found == number:
            return
        rng = np.random.default_rng((APART, seed, sample))
        low, high = SPLITS[split]
        scene = draw_scene(rng, int(rng.integers(low, high + 1)))
        asked = questions(scene, rng, task)
        if not asked:
            continue  # the scene has no unambiguous question of this task
        found += 1
        prompt = asked[int(rng.integers(len(asked)))].prompt
        yield Pair(scene.image, prompt.removeprefix("<image>").strip())


def process_pairs(processor: Any, pairs: Iterable[Pair]) -> Iterator[Sample]:
    """Pairs as :func:`llm_accel.calibrate.dyvte.calibrate_dyvte` takes them. A prompt that holds the processor's image
    token is used as it is, any other one becomes a user's turn of the chat template, or follows the image where there
    is no template.

    Raises:
        ConfigError: an image cannot be read, or the processor takes none.
    """
    reader = VisionProcessor(processor)
    for pair in pairs:
        text = pair.prompt if str(reader.image_token) in pair.prompt else reader.text(pair.prompt)
        image = open_image(pair.image, Path()) if isinstance(pair.image, str) else pair.image
        answer = None
        if pair.answer is not None:
            answer = reader.tokenizer(pair.answer, add_special_tokens=False)["input_ids"]
        yield reader.encode([text], [image]), answer
