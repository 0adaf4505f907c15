"""What a run asks: examples of one image at a time, from drawn scenes or from files."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llm_accel.eval.tasks.vision.questions import TASKS, Task, questions
from llm_accel.eval.tasks.vision.scenes import SPLITS, SplitName, draw_scene
from llm_accel.eval.tasks.vision.scoring import Mentions, pairs


@dataclass(frozen=True, eq=False)
class Example:
    """One question about one image."""

    sample: int  # which image; all examples of an image stand together
    number: int  # which question of its task about the image
    task: str  # what is asked, see :mod:`llm_accel.eval.tasks.vision.questions`
    split: str  # of existence questions, how absent objects were chosen; else empty
    image: Any  # uint8 [H, W, 3], or a PIL image
    question: str  # the text that goes with the image, without a placeholder
    answer: str  # the expected answer
    objects: frozenset[str] | None = None  # what is in the image, for captions; None where that is unknown
    patches: npt.NDArray[np.bool_] | None = None  # bool [rows, columns], covered by objects; None: unknown
    others: tuple[str, ...] = ()  # further answers that are right

    @property
    def key(self) -> tuple[int, str, int]:
        """The values that identify its records."""
        return self.sample, self.task, self.number


class Source(Protocol):
    """Where a run's examples come from; a sample is an image."""

    def __len__(self) -> int: ...

    @property
    def max_new_tokens(self) -> int:
        """What the longest answer needs."""

    @property
    def mentions(self) -> Mentions:
        """Finds the objects that a caption names."""

    def examples(self, sample: int) -> list[Example]:
        """All questions about one image."""

    def keys(self, sample: int) -> list[tuple[int, str, int]]:
        """Keys of the questions about an image, without opening it where it is a file."""

    def digest(self) -> tuple[int, str]:
        """The number of examples, and a hash over them."""


@dataclass(frozen=True)
class SceneSource:
    """Drawn scenes. Sample i is the same whatever the number of samples and the tasks are."""

    samples: int
    seed: int
    split: SplitName = "standard"
    tasks: tuple[Task, ...] = TASKS

    def __len__(self) -> int:
        return self.samples

    @property
    def max_new_tokens(self) -> int:
        """A caption takes five tokens per thing."""
        return 8 + 6 * SPLITS[self.split][1] if "caption" in self.tasks else 8

    @property
    def mentions(self) -> Mentions:
        """Finds colours with shapes."""
        return pairs

    def examples(self, sample: int) -> list[Example]:
        """One question per task, for existence one yes and one no for each of POPE's splits."""
        # The last word keeps it apart from the shorter seeds of training, which numpy pads with zeros.
        rng = np.random.default_rng((self.seed, list(SPLITS).index(self.split), sample, 1))
        low, high = SPLITS[self.split]
        scene = draw_scene(rng, int(rng.integers(low, high + 1)))
        objects = frozenset(f"{thing.colour} {thing.shape}" for thing in scene.things)
        streams = dict(zip(TASKS, rng.spawn(len(TASKS)), strict=True))
        return [
            Example(
                sample,
                number,
                task,
                asked.split,
                scene.image,
                asked.prompt.removeprefix("<image>").strip(),
                asked.answer,
                objects,
                scene.patches,
            )
            for task in self.tasks
            for number, asked in enumerate(questions(scene, streams[task], task))
        ]

    def keys(self, sample: int) -> list[tuple[int, str, int]]:
        """Keys of the questions about a scene."""
        return [example.key for example in self.examples(sample)]

    def digest(self) -> tuple[int, str]:
        """Over questions, answers and pixels."""
        every = [example for sample in range(len(self)) for example in self.examples(sample)]
        found = hashlib.sha256()
        for example in every:
            found.update(repr((example.task, example.split, example.question, example.answer)).encode())
            found.update(example.image.tobytes())
        return len(every), found.hexdigest()[:16]
