"""Scenes of a third party: a function that draws one scene, by the name of an entry point or by where it stands.

    from llm_accel.eval.tasks.vision.generators import GeneratedScene, Question

    def draw(rng):
        ...
        return GeneratedScene(image, (Question("colour", "what colour is the circle?", "red"),))

``--data scenes:NAME`` finds it in the entry-point group ``llm_accel.scenes``, ``--data scenes:MODULE:FUNCTION`` and
``--data scenes:FILE.py:FUNCTION`` without one.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_accel.errors import ConfigError, unknown_name

GROUP = "llm_accel.scenes"  # of the entry points: name of the generator = module:function
FORMS = "scenes, scenes:NAME of an installed package, scenes:MODULE:FUNCTION or scenes:FILE.py:FUNCTION"
TASK_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class Question:
    """A question about a scene and what counts as right.

    Attributes:
        task: a column of the tables; ``existence`` has answers yes and no and is scored as POPE, ``caption`` as CHAIR,
            any other name by exact match.
        text: the question without a placeholder for the image.
        answer: the right answer; of captions it may be empty, then objects alone count.
        split: of existence questions, how absent objects were chosen (``random``, ``popular``, ``adversarial``).
    """

    task: str
    text: str
    answer: str = ""
    split: str = ""


@dataclass(frozen=True, eq=False)
class GeneratedScene:
    """An image and all questions that are asked about it.

    Attributes:
        image: uint8 [H, W, 3], or a PIL image.
        questions: at least one.
        objects: the names of what is in the image, for captions.
        names: the names of everything that scenes of this generator can show: what a caption is searched for. Whole
            words, case does not matter; needed where a question is a caption.
        patches: bool [rows, columns], which patches objects cover (:func:`covered`), for the oracle, patch recall and
            pictures. Used where the model turns the image into as many visual tokens, line by line.
    """

    image: Any
    questions: Sequence[Question]
    objects: frozenset[str] = frozenset()
    names: Sequence[str] = ()
    patches: npt.NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        image = np.asarray(self.image.convert("RGB") if hasattr(self.image, "convert") else self.image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ConfigError(
                f"a scene's image is {image.dtype} {list(image.shape)}; give uint8 [H, W, 3] or a PIL image."
            )
        object.__setattr__(self, "image", image)
        if not self.questions:
            raise ConfigError("a scene has no questions; give at least one, or draw another scene.")
        for question in self.questions:
            self._check(question)
        if self.patches is not None and (self.patches.dtype != bool or self.patches.ndim != 2):
            raise ConfigError(
                f"a scene's patches are {self.patches.dtype} {list(self.patches.shape)}; give bool [rows, columns]."
            )

    def _check(self, question: Question) -> None:
        check_task(question.task, "a question")
        if question.task == "caption" and not (self.names and self.objects <= frozenset(self.names)):
            raise ConfigError(
                "a scene with a caption question needs names, what captions of this generator may name, with its "
                f"objects ({', '.join(sorted(self.objects)) or 'none'}) among them."
            )
        check_answers(question.task, (question.answer,), f"the question {question.text!r}")


def check_task(task: str, where: str) -> None:
    """Raises :class:`ConfigError` for what is no name of a task."""
    if not TASK_NAME.fullmatch(task):
        raise ConfigError(f"{where} has the task {task!r}; give lower-case letters, digits and underscores.")


def check_answers(task: str, answers: Sequence[str], where: str) -> None:
    """Raises :class:`ConfigError` for right answers that a task cannot be scored by."""
    if task == "existence" and [answer.lower() for answer in answers] not in (["yes"], ["no"]):
        raise ConfigError(f"{where}, an existence question, has the answer {' | '.join(answers)!r}; give yes or no.")
    if task != "caption" and not all(answer.strip() for answer in answers):
        raise ConfigError(f"{where} has no answer; give one, or the task caption and the objects of the image.")


def covered(mask: npt.NDArray[Any], rows: int, columns: int, share: float = 0.12) -> npt.NDArray[np.bool_]:
    """The patches that objects cover by more than a share, bool [rows, columns].

    Args:
        mask: [H, W], nonzero where an object is.
        rows, columns: patches of the model, such as 24 and 24 of CLIP-L/336.
        share: of a patch, from 0 to 1.
    """
    edges = [np.arange(n + 1) * size // n for n, size in zip((rows, columns), mask.shape, strict=True)]
    sums = np.pad((mask != 0).cumsum(0).cumsum(1), ((1, 0), (1, 0)))[np.ix_(*edges)]
    area = np.outer(*(np.diff(edge) for edge in edges))
    inside: npt.NDArray[np.bool_] = np.diff(np.diff(sums, axis=0), axis=1) > share * area
    return inside


def load_generator(place: str) -> Callable[[np.random.Generator], GeneratedScene]:
    """The function that ``--data scenes:PLACE`` names. Raises :class:`ConfigError`: there is none."""
    module, colon, name = place.rpartition(":")
    if not colon:
        return _installed(place)
    try:
        found: Any = _module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except ConfigError:
        raise
    except Exception as error:  # whatever somebody else's module does while it is imported
        raise ConfigError(f"--data 'scenes:{place}' cannot be imported: {type(error).__name__}: {error}") from error
    return _callable(found, place)


def _module(name: str) -> Any:
    if not name.endswith(".py"):
        return importlib.import_module(name)
    path = Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(f"--data: {name!r}: no such file; give {FORMS}.")
    own = f"llm_accel_scenes_{path.stem}"  # a file may be called like a package
    spec = importlib.util.spec_from_file_location(own, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[own] = module  # where dataclasses and pickle look for it
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[own]
        raise
    return module


def _installed(name: str) -> Callable[[np.random.Generator], GeneratedScene]:
    points = {(point.name, point.value): point for point in entry_points(group=GROUP)}
    own = [point for (known, _), point in points.items() if known == name]
    if len(own) > 1:
        raise ConfigError(
            f"--data 'scenes:{name}' is defined by {' and '.join(point.value for point in own)}; give one of these "
            "in place of the name."
        )
    if not own:
        known = [point.name for point in points.values()]
        raise ConfigError(f"--data: {unknown_name('scene generator', name, known)} Give {FORMS}.")
    try:
        return _callable(own[0].load(), name)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"--data 'scenes:{name}' ({own[0].value}) cannot be imported: {error}") from error


def _callable(found: Any, place: str) -> Callable[[np.random.Generator], GeneratedScene]:
    if not callable(found):
        raise ConfigError(f"--data 'scenes:{place}' is {found!r}; give a function that draws a scene from a generator.")
    return found  # type: ignore[no-any-return]
