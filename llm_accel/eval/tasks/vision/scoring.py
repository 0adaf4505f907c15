"""Scores of answers: exact match, POPE's confusion counts, and CHAIR."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llm_accel.eval.tasks.vision.scenes import COLOURS, SHAPES

_WORD = re.compile(r"[a-z]+")
_PAIR = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})s?\b")

Mentions = Callable[[str], list[str]]


def normal(text: str) -> str:
    """Lower case, white space made single, the last full stop left out."""
    return " ".join(text.lower().split()).removesuffix(".").rstrip()


def exact(answer: str, expected: str) -> float:
    """Whether an answer is the expected one, 0 or 1."""
    return float(normal(answer) == normal(expected))


def yes_no(answer: str) -> str | None:
    """The first of ``yes``, ``no`` and ``not`` among the words of an answer, as yes or no; None where there is none."""
    said = next((word for word in _WORD.findall(answer.lower()) if word in ("yes", "no", "not")), None)
    return "no" if said == "not" else said


def pairs(text: str) -> list[str]:
    """Things named in a text about a drawn scene, colour and shape, in order."""
    return [" ".join(match) for match in _PAIR.findall(text.lower())]


def score(task: str, answer: str, expected: str, objects: frozenset[str] | None, mentions: Mentions) -> dict[str, Any]:
    """The scores of a record: ``exact``; ``said`` for existence; what CHAIR counts for captions.

    ``mentions`` finds the objects that a caption names. ``named`` has every mention, ``invented`` those that are not in
    the image, ``found`` counts the different objects of the image that are named, ``there`` all that it has.
    """
    if task == "existence":
        said = yes_no(answer)
        return {"exact": float(said == normal(expected)), "said": said}
    if task != "caption":
        return {"exact": exact(answer, expected)}
    assert objects is not None
    named = mentions(answer)
    scores: dict[str, Any] = {
        "named": named,
        "invented": [name for name in named if name not in objects],
        "found": len(objects.intersection(named)),
        "there": len(objects),
        "words": len(answer.split()),
    }
    return {"exact": exact(answer, expected) if expected else float(objects == set(named))} | scores


@dataclass(frozen=True)
class Confusion:
    """Counts of yes-no questions. An answer that says neither is wrong, and counts as not yes.

    Attributes:
        true_yes, false_yes, true_no, false_no: the answer was right or wrong, and this.
        neither: answers without yes or no; they count in no other attribute.
        missed: those of ``neither`` to which yes was right.
    """

    true_yes: int = 0
    false_yes: int = 0
    true_no: int = 0
    false_no: int = 0
    neither: int = 0
    missed: int = 0

    @staticmethod
    def of(answers: Sequence[tuple[str | None, str]]) -> Confusion:
        """From what was said (yes, no or None) and what was right (yes or no)."""
        return Confusion(
            true_yes=answers.count(("yes", "yes")),
            false_yes=answers.count(("yes", "no")),
            true_no=answers.count(("no", "no")),
            false_no=answers.count(("no", "yes")),
            neither=sum(said is None for said, _ in answers),
            missed=answers.count((None, "yes")),
        )

    @property
    def n(self) -> int:
        """All answers."""
        return self.true_yes + self.false_yes + self.true_no + self.false_no + self.neither

    @property
    def right(self) -> int:
        """Right answers."""
        return self.true_yes + self.true_no

    @property
    def precision(self) -> float | None:
        """Share of right ones among the answers yes; None where there is none."""
        return ratio(self.true_yes, self.true_yes + self.false_yes)

    @property
    def recall(self) -> float | None:
        """Share of answers yes where yes was right."""
        return ratio(self.true_yes, self.true_yes + self.false_no + self.missed)

    @property
    def f1(self) -> float | None:
        """Harmonic mean of precision and recall; 0 where no yes was right."""
        wrong = self.false_yes + self.false_no + self.missed
        return ratio(2 * self.true_yes, 2 * self.true_yes + wrong)

    @property
    def yes_ratio(self) -> float | None:
        """Share of answers yes."""
        return ratio(self.true_yes + self.false_yes, self.n)


def ratio(part: float, whole: float) -> float | None:
    """A share, or None of nothing."""
    return part / whole if whole else None
