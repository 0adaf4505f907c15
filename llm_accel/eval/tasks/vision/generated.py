"""Scenes that a third party's generator draws, as examples."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from llm_accel.errors import ConfigError, unknown_name
from llm_accel.eval.tasks.vision.examples import Example
from llm_accel.eval.tasks.vision.generators import GeneratedScene, load_generator
from llm_accel.eval.tasks.vision.scoring import Mentions, naming

CAPTION_TOKENS = 64  # where no expected caption tells how long one is


@dataclass(frozen=True)
class _Summary:
    """What all scenes have in common, and a hash over them."""

    examples: int
    digest: str
    max_new_tokens: int
    mentions: Mentions
    tasks: frozenset[str]


@dataclass(frozen=True)
class GeneratedSource:
    """Scenes of ``draw``. Sample i is the same whatever the number of samples and the tasks are."""

    place: str
    draw: Callable[[np.random.Generator], GeneratedScene]
    samples: int
    seed: int
    tasks: Sequence[str] | None = None

    @classmethod
    def load(cls, place: str, samples: int, seed: int, tasks: Sequence[str] | None) -> GeneratedSource:
        """What ``--data scenes:PLACE`` names. Raises :class:`ConfigError`: no such generator, or what it draws cannot
        be used."""
        source = cls(place, load_generator(place), samples, seed, tasks)
        source._check()
        return source

    def __len__(self) -> int:
        return self.samples

    @property
    def mentions(self) -> Mentions:
        """Finds names of the generator's objects in a caption."""
        return self._all.mentions

    @property
    def max_new_tokens(self) -> int:
        """Two tokens for each word of the longest answer."""
        return self._all.max_new_tokens

    def examples(self, sample: int) -> list[Example]:
        """The questions about a scene, those of a task together."""
        return self._asked(sample, self._scene(sample))

    def _asked(self, sample: int, scene: GeneratedScene) -> list[Example]:
        found = []
        for task in dict.fromkeys(question.task for question in scene.questions):
            if self.tasks is not None and task not in self.tasks:
                continue
            for number, asked in enumerate(question for question in scene.questions if question.task == task):
                told = (asked.text, asked.answer, scene.objects, scene.patches)
                found.append(Example(sample, number, task, asked.split, scene.image, *told))
        return found

    def keys(self, sample: int) -> list[tuple[int, str, int]]:
        """Keys of the questions about a scene."""
        return [example.key for example in self.examples(sample)]

    def digest(self) -> tuple[int, str]:
        """Over questions, answers and pixels."""
        return self._all.examples, self._all.digest

    @cached_property
    def _all(self) -> _Summary:
        """What is known once every scene has been drawn, each once and kept by nobody."""
        found, count, longest, open_ended = hashlib.sha256(), 0, 0, False
        names: set[str] = set()
        tasks: set[str] = set()
        for sample in range(self.samples):
            scene = self._scene(sample)
            names |= set(scene.names)
            tasks |= {question.task for question in scene.questions}
            for example in self._asked(sample, scene):
                found.update(_content(example))
                count += 1
                longest = max(longest, len(re.findall(r"\w+|[^\w\s]", example.answer)))
                open_ended |= example.answer == ""
        new_tokens = CAPTION_TOKENS if open_ended else 8 + 2 * longest
        return _Summary(count, found.hexdigest()[:16], new_tokens, naming(names), frozenset(tasks))

    def _scene(self, sample: int) -> GeneratedScene:
        about = f"--data 'scenes:{self.place}', scene {sample}"
        try:
            scene = self.draw(np.random.default_rng((self.seed, sample, zlib.crc32(b"scenes"))))
        except Exception as error:
            raise ConfigError(f"{about}: {type(error).__name__}: {error}") from error
        if not isinstance(scene, GeneratedScene):
            raise ConfigError(f"{about} is a {type(scene).__name__}; the function must return a GeneratedScene.")
        return scene

    def _check(self) -> None:
        first, again = ([_content(example) for example in self.examples(0)] for _ in range(2))
        if first != again:
            raise ConfigError(
                f"--data 'scenes:{self.place}' draws another scene from the same random numbers; it must use the "
                "generator that it is given, and nothing else that is random."
            )
        asked = self._all.tasks  # draws every scene, so that one that cannot be used ends here
        for task in self.tasks or ():
            if task not in asked:
                raise ConfigError(f"--tasks: {unknown_name('task', task, asked)}")


def _content(example: Example) -> bytes:
    told: list[Any] = [example.task, example.split, example.question, example.answer, sorted(example.objects or ())]
    pixels: bytes = example.image.tobytes()
    return repr(told).encode() + pixels
