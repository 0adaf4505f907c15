"""Questions about a scene, with the one right answer to each.

Existence is asked as POPE asks it (Li et al. 2023, arXiv:2305.10355): as many pairs that are there as pairs that are
not, and three ways to choose what is not there, scored apart. ``random``: any absent pair. ``popular``: one of the
three absent pairs that are most frequent in the data. ``adversarial``: one of the three absent pairs that most often
occur together with what is there. Prior knowledge helps a model with the first, and misleads it with the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llm_accel.eval.tasks.vision.scenes import COLOURS, PAIRS, SHAPES, SKEWED, Prior, Scene, Thing

Task = Literal["existence", "colour", "shape", "count", "spatial", "caption"]
TASKS: tuple[Task, ...] = ("existence", "colour", "shape", "count", "spatial", "caption")
PopeSplit = Literal["random", "popular", "adversarial"]
POPE_SPLITS: tuple[PopeSplit, ...] = ("random", "popular", "adversarial")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
CANDIDATES = 3  # absent pairs to choose from, half of POPE's six questions per image


@dataclass(frozen=True)
class SceneQuestion:
    """A prompt as the processor takes it (one ``<image>``) and its answer; ``split`` is POPE's, for existence only."""

    task: Task
    prompt: str
    answer: str
    split: PopeSplit | Literal[""] = ""


def questions(
    scene: Scene, rng: np.random.Generator, task: Task, limit: int = 1, prior: Prior = SKEWED
) -> tuple[SceneQuestion, ...]:
    """Up to ``limit`` different questions of a task in random order.

    Existence gives ``limit`` times one yes and one no for each of POPE's splits (fewer if the scene has fewer things).
    A scene in which the task has no unambiguous question (the colour of a shape that occurs twice, the place of a thing
    that is alone) gives none. ``prior``: what the scene was drawn from, for POPE's popular and adversarial splits.
    """
    if task == "existence":
        return _existence(scene, rng, min(limit, len(scene.things)), prior)
    asked = [SceneQuestion(task, f"<image> {text}", answer) for text, answer in _WRITERS[task](scene)]
    return tuple(asked[i] for i in rng.permutation(len(asked))[:limit])


def caption(things: Iterable[Thing]) -> str:
    """The caption of an image: its things in reading order."""
    return ", ".join(f"a {thing.colour} {thing.shape}" for thing in things) + "."


def _existence(scene: Scene, rng: np.random.Generator, number: int, prior: Prior) -> tuple[SceneQuestion, ...]:
    present = [thing.pair for thing in scene.things]
    absent = np.setdiff1d(np.arange(PAIRS), present)
    order: dict[PopeSplit, list[int]] = {
        "random": absent.tolist(),
        "popular": absent[np.argsort(-prior.weights[absent], kind="stable")].tolist()[:CANDIDATES],
        "adversarial": absent[np.argsort(-prior.following(present)[absent], kind="stable")].tolist()[:CANDIDATES],
    }
    asked = []
    for split, candidates in order.items():
        yes = rng.permutation(present)[:number].tolist()
        no = rng.permutation(candidates)[:number].tolist()
        for answer, pairs in (("yes", yes[: len(no)]), ("no", no)):
            for pair in pairs:
                shape, colour = divmod(pair, len(COLOURS))
                text = f"<image> is there a {COLOURS[colour]} {SHAPES[shape]}?"
                asked.append(SceneQuestion("existence", text, answer, split))
    return tuple(asked)


def _colour(scene: Scene) -> list[tuple[str, str]]:
    return [(f"what colour is the {t.shape}?", t.colour) for t in _single(scene, lambda t: t.shape)]


def _shape(scene: Scene) -> list[tuple[str, str]]:
    return [(f"what shape is the {t.colour} thing?", t.shape) for t in _single(scene, lambda t: t.colour)]


def _count(scene: Scene) -> list[tuple[str, str]]:
    return [("how many things are there?", NUMBERS[len(scene.things) - 1])]


def _spatial(scene: Scene) -> list[tuple[str, str]]:
    """Both directions of every two things; not asked where they share a row or a column."""
    asked = []
    for a in scene.things:
        for b in scene.things:
            one, other = f"the {a.colour} {a.shape}", f"the {b.colour} {b.shape}"
            if a.column != b.column:
                asked.append((f"is {one} left or right of {other}?", "left" if a.column < b.column else "right"))
            if a.row != b.row:
                asked.append((f"is {one} above or below {other}?", "above" if a.row < b.row else "below"))
    return asked


def _caption(scene: Scene) -> list[tuple[str, str]]:
    return [("describe the image.", caption(scene.things))]


def _single(scene: Scene, attribute: Callable[[Thing], str]) -> list[Thing]:
    """The things that no other thing shares an attribute with."""
    values = [attribute(thing) for thing in scene.things]
    return [thing for thing, value in zip(scene.things, values, strict=True) if values.count(value) == 1]


_WRITERS: dict[Task, Callable[[Scene], list[tuple[str, str]]]] = {
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "spatial": _spatial,
    "caption": _caption,
}
