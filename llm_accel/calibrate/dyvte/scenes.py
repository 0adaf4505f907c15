"""Drawn scenes as samples, from other random streams than those that train and judge the bundled vision model."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, cycle

import numpy as np

from llm_accel.calibrate.dyvte.samples import Pair
from llm_accel.eval.tasks.vision.questions import TASKS, questions
from llm_accel.eval.tasks.vision.scenes import SPLITS, draw_scene

APART = 2**20  # first word of the seed; training and evaluation begin theirs with small numbers


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
