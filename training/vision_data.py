"""Batches of the bundled vision model: an image and several questions about it, packed behind it.

The questions of an image are invisible to one another (a 4-D attention mask) and each begins at the position behind the
image, so a packed text gives exactly what its questions give one by one, at a fraction of the cost.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from llm_accel.eval.tasks.vision.questions import SceneQuestion, Task, questions
from llm_accel.eval.tasks.vision.scenes import (
    PAIRS,
    PATCH,
    SIZE,
    SKEWED,
    SPLITS,
    Prior,
    Scene,
    SplitName,
    Thing,
    draw_scene,
)
from training.vision_init import BOS, EOS, IMAGE, MEAN, PAD, SPREAD, VISUAL_TOKENS, WORDS
from training.vision_world import World, draw_world

PREFIX = 1 + VISUAL_TOKENS  # bos and the image
IGNORED = -100  # label of tokens that carry no loss
Subject = Task | Literal["half"]  # of a question in training
Kind = SplitName | Literal["world", "crowd"]
"""Of scenes: the package's two splits, and training's with few or many things."""
COUNTS: Mapping[Kind, tuple[int, int]] = {
    "standard": SPLITS["standard"],
    "dense": SPLITS["dense"],
    "world": (1, 6),
    "crowd": (7, 12),
}
ASIDE = 4.0  # pixels between two centres, or from the middle of the image, from which on left or above is asked
_IDS = {word: i for i, word in enumerate(WORDS)}


def draw_scenes(number: int, seed: int, kind: Kind = "standard", prior: Prior = SKEWED) -> list[Scene]:
    """``number`` scenes of a kind, each count of things equally likely; the same seed draws the same scenes.

    ``prior`` goes for those of the package; those of training are half skewed, half level.
    """
    rng = np.random.default_rng(seed)
    low, high = COUNTS[kind]
    counts = (int(rng.integers(low, high + 1)) for _ in range(number))
    return [draw_scene(rng, count, prior) if kind in SPLITS else draw_world(rng, count) for count in counts]


@dataclass
class Batch:
    """B images with the questions about each, L tokens at most; all tensors, but for the list of questions.

    ``spans`` has one (row, first answer token, end, question) per question; the end token belongs to the answer.
    """

    pixels: Tensor  # [B, 3, 80, 80]
    pairs: Tensor  # [B, 40], 1 where the scene has the pair
    patches: Tensor  # [B, 100], 0 for background, else 1 + pair
    ids: Tensor  # [B, L]
    labels: Tensor  # [B, L]
    positions: Tensor  # [B, L]
    mask: Tensor  # [B, 1, L, L], True where the row may look
    spans: list[tuple[int, int, int, SceneQuestion]]


def ask(scene: Scene, rng: np.random.Generator, mix: Mapping[Subject, int]) -> list[SceneQuestion]:
    """Questions about a scene: so many of each kind as ``mix`` says, where the scene has them."""
    asked: list[SceneQuestion] = []
    for subject, number in mix.items():
        if subject == "half":
            found = _halves(scene)
        elif subject == "spatial":
            found = _sides(scene)
        elif subject == "caption" and isinstance(scene, World) and not scene.clear:
            found = ()
        else:
            found = questions(scene, rng, subject, -(-number // 6) if subject == "existence" else number)
        asked += [found[i] for i in rng.permutation(len(found))[:number]]
    return asked


def _halves(scene: Scene) -> tuple[SceneQuestion, ...]:
    """In which half of the grid each thing lies: a stepping stone to the place of one thing beside another.

    Asked about two things right away, the model learns nothing: it would have to find both and to compare them at once.
    """
    asked = []
    for thing, (y, x) in _named(scene):
        name = f"<image> is the {thing.colour} {thing.shape}"
        if abs(x - SIZE / 2) >= ASIDE:
            asked.append(SceneQuestion("spatial", f"{name} left or right?", "left" if x < SIZE / 2 else "right"))
        if abs(y - SIZE / 2) >= ASIDE:
            asked.append(SceneQuestion("spatial", f"{name} above or below?", "above" if y < SIZE / 2 else "below"))
    return tuple(asked)


def _sides(scene: Scene) -> tuple[SceneQuestion, ...]:
    """Where each thing lies beside each other one, by their centres; on the package's grid the same questions and
    answers as the package's."""
    asked = []
    for a, (y, x) in _named(scene):
        for b, (other_y, other_x) in _named(scene):
            one, other = f"<image> is the {a.colour} {a.shape}", f"the {b.colour} {b.shape}?"
            if abs(x - other_x) >= ASIDE:
                side = "left" if x < other_x else "right"
                asked.append(SceneQuestion("spatial", f"{one} left or right of {other}", side))
            if abs(y - other_y) >= ASIDE:
                level = "above" if y < other_y else "below"
                asked.append(SceneQuestion("spatial", f"{one} above or below {other}", level))
    return tuple(asked)


def _named(scene: Scene) -> list[tuple[Thing, tuple[float, float]]]:
    """The things whose shape and colour name them alone, with row and column of the centre of their box in pixels."""
    pairs = [thing.pair for thing in scene.things]
    boxes = [(thing, thing.box) for thing in scene.things if pairs.count(thing.pair) == 1]
    return [(thing, ((top + bottom) / 2, (left + right) / 2)) for thing, (top, left, bottom, right) in boxes]


def pack(scenes: Sequence[Scene], asked: Sequence[Sequence[SceneQuestion]], hidden: Tensor | None = None) -> Batch:
    """One row per scene. ``hidden``: visual tokens that nothing may look at, bool [B, 100]; None hides none."""
    rows = [[(_encode(q.prompt), _encode(q.answer, end=True), q) for q in row] for row in asked]
    length = PREFIX + max(sum(len(p) + len(a) for p, a, _ in row) for row in rows)
    shape = (len(scenes), length)
    ids, labels = np.full(shape, _IDS[PAD]), np.full(shape, IGNORED)
    positions, segment = np.zeros(shape, np.int64), np.full(shape, -1)
    ids[:, :PREFIX] = [_IDS[BOS], *[_IDS[IMAGE]] * VISUAL_TOKENS]
    positions[:, :PREFIX], segment[:, :PREFIX] = np.arange(PREFIX), 0
    spans = []
    for b, row in enumerate(rows):
        at = PREFIX
        for k, (prompt, answer, question) in enumerate(row, 1):
            start, end = at + len(prompt), at + len(prompt) + len(answer)
            ids[b, at:end], labels[b, start:end] = prompt + answer, answer
            positions[b, at:end], segment[b, at:end] = PREFIX + np.arange(end - at), k
            spans.append((b, start, end, question))
            at = end
    mask = (segment[:, :, None] == segment[:, None]) | (segment == 0)[:, None]
    mask &= np.tril(np.ones((length, length), bool))
    if hidden is not None:
        mask[:, :, 1:PREFIX] &= ~hidden.numpy()[:, None]
    mask |= np.eye(length, dtype=bool)
    images = np.stack([scene.image for scene in scenes]).astype(np.float32) / 255
    pairs = np.zeros((len(scenes), PAIRS), np.float32)
    for b, scene in enumerate(scenes):
        pairs[b, [thing.pair for thing in scene.things]] = 1
    return Batch(
        pixels=torch.from_numpy((images - MEAN) / SPREAD).permute(0, 3, 1, 2).contiguous(),
        pairs=torch.from_numpy(pairs),
        patches=torch.from_numpy(np.stack([patch_classes(scene) for scene in scenes])),
        ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        positions=torch.from_numpy(positions),
        mask=torch.from_numpy(mask[:, None]),
        spans=spans,
    )


def patch_classes(scene: Scene) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """What each patch shows, int64 [100]: 0 for background, else 1 + the pair of the thing that covers most of it."""
    n = SIZE // PATCH
    owner = scene.owner.reshape(n, PATCH, n, PATCH).swapaxes(1, 2).reshape(n * n, -1)
    share = (owner[..., None] == np.arange(1, 1 + len(scene.things))).sum(1)
    pairs = np.array([thing.pair for thing in scene.things])
    return np.where(scene.patches.ravel(), 1 + pairs[share.argmax(1)], 0)


@cache
def _encode(text: str, end: bool = False) -> list[int]:
    """Token ids of a text without its ``<image>``, as the tokenizer gives them (it is slower, and texts repeat)."""
    words = re.findall(r"\w+|[^\w\s]", text.removeprefix(IMAGE))
    return [_IDS[word] for word in words] + [_IDS[EOS]] * end
