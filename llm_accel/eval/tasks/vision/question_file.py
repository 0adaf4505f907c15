"""Questions of your own about images of your own: a folder of images with a file of questions, JSON lines or CSV."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llm_accel.errors import ConfigError, unknown_name
from llm_accel.eval.rows import read_file
from llm_accel.eval.tasks.vision.examples import Example
from llm_accel.eval.tasks.vision.generated import CAPTION_TOKENS
from llm_accel.eval.tasks.vision.generators import check_answers, check_task
from llm_accel.eval.tasks.vision.scoring import Mentions, naming
from llm_accel.eval.tasks.vision.sources import DESCRIBE, open_image

COLUMNS = ("image", "question", "answer", "task", "split", "objects")
NAMES = ("questions.jsonl", "questions.json", "questions.csv")
FORMS = f"a folder with one of {', '.join(NAMES)}, or such a file"
SHORT_TOKENS = 32


@dataclass(frozen=True)
class AskedRow:
    """A row of the file, checked."""

    image: str
    question: str
    answers: tuple[str, ...]  # one of them is enough; of a caption (empty,) where only objects count
    task: str
    split: str
    objects: frozenset[str]


@dataclass(frozen=True)
class QuestionFile:
    """Rows grouped by image in the order of the file; images are opened when they are asked for."""

    groups: Sequence[tuple[AskedRow, ...]]
    folder: Path

    @classmethod
    def load(cls, place: str, samples: int | None, tasks: Collection[str] | None) -> QuestionFile:
        """What ``--data questions:PLACE`` names, at most ``samples`` images of it. Raises :class:`ConfigError`: it
        cannot be read, or a row says what cannot be asked."""
        file = _file(Path(place).expanduser())
        given = enumerate(read_file(file, "--data questions:", FORMS), 1)
        rows = [_checked(row, f"--data 'questions:{place}', row {number}") for number, row in given]
        known = {row.task for row in rows}
        for task in tasks or ():
            if task not in known:
                raise ConfigError(f"--tasks: {unknown_name('task', task, known)}")
        groups: dict[str, list[AskedRow]] = {}
        for row in rows:
            if tasks is None or row.task in tasks:
                groups.setdefault(row.image, []).append(row)
        if not groups:
            raise ConfigError(f"--data 'questions:{place}' has no rows; give {FORMS}.")
        chosen = list(groups.items())[:samples]
        lost = [image for image, _ in chosen if not (file.parent / image).is_file()]
        if lost:
            raise ConfigError(
                f"--data 'questions:{place}': {len(lost)} of {len(chosen)} images are not there, first "
                f"{str(file.parent / lost[0])!r}; paths are relative to the folder of {file.name}."
            )
        return cls([tuple(rows) for _, rows in chosen], file.parent)

    def __len__(self) -> int:
        return len(self.groups)

    @cached_property
    def mentions(self) -> Mentions:
        """Finds the objects of any row in a caption."""
        return naming({name for group in self.groups for row in group for name in row.objects})

    @property
    def max_new_tokens(self) -> int:
        """64 where an image is described, 32 otherwise."""
        described = any(row.task == "caption" for group in self.groups for row in group)
        return CAPTION_TOKENS if described else SHORT_TOKENS

    def examples(self, sample: int) -> list[Example]:
        """All questions about one image."""
        rows = self.groups[sample]
        image = open_image(rows[0].image, self.folder)
        return [
            Example(
                sample,
                number,
                task,
                row.split,
                image,
                row.question,
                row.answers[0],
                row.objects,
                others=row.answers[1:],
            )
            for (_, task, number), row in zip(self.keys(sample), rows, strict=True)
        ]

    def keys(self, sample: int) -> list[tuple[int, str, int]]:
        """Keys of the questions about an image, without opening it."""
        tasks = [row.task for row in self.groups[sample]]
        return [(sample, task, tasks[:place].count(task)) for place, task in enumerate(tasks)]

    def digest(self) -> tuple[int, str]:
        """Over the rows; of images, over their names."""
        every = [row for group in self.groups for row in group]
        told = [(row.image, row.question, row.answers, row.task, row.split, sorted(row.objects)) for row in every]
        return len(every), hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = [path / name for name in NAMES if (path / name).is_file()]
    if len(found) != 1:
        has = " and ".join(file.name for file in found) or "none"
        raise ConfigError(f"--data 'questions:{path}': a folder needs one of {', '.join(NAMES)} and has {has}.")
    return found[0]


def _checked(row: Any, where: str) -> AskedRow:
    if not isinstance(row, dict):
        raise ConfigError(f"{where} is {row!r}; give an object with {', '.join(COLUMNS)}.")
    for name in map(str, row):
        if name not in COLUMNS and not name.startswith("_"):
            told = unknown_name("column", name, COLUMNS)
            raise ConfigError(f"{where}: {told} Begin the name of a column of your own with _.")
    one = {name: _words(row.get(name), name, where) for name in COLUMNS}
    for name in ("image", "question", "task", "split"):
        if len(one[name]) > 1:
            raise ConfigError(f"{where}: {name} is {row[name]!r}; give one text.")
    image, question, task, split = ("".join(one[name]) for name in ("image", "question", "task", "split"))
    task = task or "question"
    check_task(task, where)
    question = question or (DESCRIBE if task == "caption" else "")
    if not image or not question:
        raise ConfigError(f"{where} has no {'question' if image else 'image'}; a row needs image, question and answer.")
    if task == "caption" and "objects" not in row:
        raise ConfigError(
            f"{where}, a caption, has no objects; give the names of what is in the image, or an empty list."
        )
    answers = one["answer"] or ("",)
    check_answers(task, answers, where)
    return AskedRow(image, question, answers, task, split, frozenset(one["objects"]))


def _words(value: Any, name: str, where: str) -> tuple[str, ...]:
    """A cell as texts: a list, or one text, in which ``|`` separates several answers or objects."""
    if isinstance(value, str) and name in ("answer", "objects"):
        value = value.split("|")
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(one, str | int | float) and not isinstance(one, bool) for one in values):
        raise ConfigError(
            f"{where}: {name} is {value!r}; give a text" + (", or a list." if name in ("answer", "objects") else ".")
        )
    return tuple(text for one in values if (text := str(one).strip()))
