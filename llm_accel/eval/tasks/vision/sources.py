"""POPE and CHAIR on your own images: rows of a JSON-lines file, or of a ``datasets`` dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from llm_accel.errors import ConfigError
from llm_accel.eval.rows import FORMS, read_rows
from llm_accel.eval.tasks.vision.coco import categories, objects_in
from llm_accel.eval.tasks.vision.examples import Example
from llm_accel.eval.tasks.vision.questions import POPE_SPLITS
from llm_accel.eval.tasks.vision.scoring import Mentions

YES_NO_SUFFIX = "\nAnswer the question using a single word or phrase."
DESCRIBE = "Please describe this image in detail."

Row = dict[str, Any]


@dataclass(frozen=True)
class RowSource:
    """Rows grouped by image; images are opened when they are asked for."""

    kind: str
    groups: Sequence[Sequence[Row]]
    folder: Path

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def max_new_tokens(self) -> int:
        """64 for captions, as in the published comparisons; CHAIR grows with the length that is allowed."""
        return 16 if self.kind == "pope" else 64

    @property
    def mentions(self) -> Mentions:
        """Finds COCO categories."""
        return objects_in

    def examples(self, sample: int) -> list[Example]:
        """All questions about one image."""
        rows = self.groups[sample]
        image = open_image(rows[0]["image"], self.folder)
        if self.kind == "chair":
            question = str(rows[0].get("question") or DESCRIBE)
            return [Example(sample, 0, "caption", "", image, question, "", _objects(rows[0]))]
        return [
            Example(sample, i, "existence", row["category"], image, row["question"] + YES_NO_SUFFIX, row["answer"])
            for i, row in enumerate(rows)
        ]

    def keys(self, sample: int) -> list[tuple[int, str, int]]:
        """Keys of the questions about an image, without opening it."""
        if self.kind == "chair":
            return [(sample, "caption", 0)]
        return [(sample, "existence", number) for number in range(len(self.groups[sample]))]

    def digest(self) -> tuple[int, str]:
        """Over the rows; of images, over their names."""
        every = [row for group in self.groups for row in group]
        plain = [[(key, value) for key, value in row.items() if isinstance(value, str | list)] for row in every]
        return len(every), hashlib.sha256(repr(plain).encode()).hexdigest()[:16]


def load_rows(data: str, limit: int | None) -> RowSource:
    """What ``--data pope:SOURCE`` or ``chair:SOURCE`` names, at most ``limit`` images of it. Raises
    :class:`ConfigError`: the source cannot be read, or a row lacks what is needed."""
    kind, _, place = data.partition(":")
    path = Path(place).expanduser()
    raw = read_rows(place, "--data")
    check = _pope_row if kind == "pope" else _chair_row
    default = next((split for split in POPE_SPLITS if split in path.name), "")
    groups: list[list[Row]] = []
    checked = (check(row, f"--data {data!r}, row {i}", default) for i, row in enumerate(raw))
    for _, rows in groupby(checked, key=lambda row: row["key"]):
        if len(groups) == limit:
            break
        groups.append(list(rows))
    if not groups:
        raise ConfigError(f"--data {data!r} has no rows; give {FORMS}.")
    return RowSource(kind, groups, path.parent)


def _pope_row(row: Row, where: str, default: str) -> Row:
    question, answer = row.get("question") or row.get("text"), row.get("answer") or row.get("label")
    if row.get("image") is None or not question or str(answer).lower() not in ("yes", "no"):
        raise ConfigError(f"{where}: POPE needs image, question (or text) and answer (or label) yes or no.")
    return {
        "image": row["image"],
        "question": str(question),
        "answer": str(answer).lower(),
        "category": str(row.get("category") or default),
        "key": row.get("image_source") or (row["image"] if isinstance(row["image"], str) else where),
    }


def _chair_row(row: Row, where: str, default: str) -> Row:
    known, objects = categories(), row.get("objects")
    if row.get("image") is None or not isinstance(objects, list | tuple):
        raise ConfigError(f"{where}: CHAIR needs image and objects, the names of COCO categories in it.")
    unknown = sorted({str(name) for name in objects} - set(known))
    if unknown:
        raise ConfigError(f"{where}: {', '.join(map(repr, unknown))} is not a COCO category: {', '.join(known)}.")
    return {**row, "key": where}


def _objects(row: Row) -> frozenset[str]:
    """Objects of an image, and those that people named when they described it."""
    captions = row.get("captions") or row.get("answer") or ()
    return frozenset(row["objects"]).union(*(objects_in(text) for text in captions))


def open_image(image: Any, folder: Path) -> Any:
    """A PIL image in RGB: as given, or from a path relative to the file."""
    if not isinstance(image, str):
        return image.convert("RGB")
    from PIL import Image

    try:
        with Image.open(folder / image) as opened:
            return opened.convert("RGB")
    except OSError as error:
        raise ConfigError(f"image {str(folder / image)!r} cannot be opened: {error}") from error
