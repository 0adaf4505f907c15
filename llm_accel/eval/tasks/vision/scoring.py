"""Scores of answers: exact match, POPE, and CHAIR."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

from llm_accel.eval.tasks.vision.scenes import COLOURS, SHAPES

_WORD = re.compile(r"[a-z]+")
_PAIR = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})s?\b")

Mentions = Callable[[str], list[str]]


def normalized(text: str) -> str:
    """Lower case, white space made single, the last full stop left out."""
    return " ".join(text.lower().split()).removesuffix(".").rstrip()


def exact(answer: str, *expected: str) -> float:
    """Whether an answer is one of the expected ones, 0 or 1."""
    return float(normalized(answer) in map(normalized, expected))


def yes_no(answer: str) -> str | None:
    """The first of ``yes``, ``no`` and ``not`` among the words of an answer, as yes or no; None where there is none."""
    said = next((word for word in _WORD.findall(answer.lower()) if word in ("yes", "no", "not")), None)
    return "no" if said == "not" else said


def pairs(text: str) -> list[str]:
    """Things named in a text about a drawn scene, colour and shape, in order."""
    return [" ".join(match) for match in _PAIR.findall(text.lower())]


def naming(names: Collection[str]) -> Mentions:
    """Finds these names in a text, in order and with repetitions: whole words of any case, singular or with an s. Where
    several fit, the longest one counts."""
    known = {normalized(name): name for name in names}
    longest_first = sorted(map(re.escape, known), key=len, reverse=True)
    pattern = re.compile(rf"\b({'|'.join(longest_first)})s?\b") if known else None

    def mentions(text: str) -> list[str]:
        return [] if pattern is None else [known[name] for name in pattern.findall(normalized(text))]

    return mentions


def score(
    task: str, answer: str, expected: Sequence[str], objects: frozenset[str] | None, mentions: Mentions
) -> dict[str, Any]:
    """The scores of a record: ``exact``; ``said`` for existence; what CHAIR counts for captions.

    ``expected`` has the right answers, of which one is enough; of a caption the first may be empty. ``mentions`` finds
    the objects that a caption names. ``named`` has every mention, ``invented`` those that are not in the image,
    ``found`` counts the different objects of the image that are named, ``there`` all that it has.
    """
    if task == "existence":
        said = yes_no(answer)
        return {"exact": float(said == normalized(expected[0])), "said": said}
    if task != "caption":
        return {"exact": exact(answer, *expected)}
    assert objects is not None
    named = mentions(answer)
    scores: dict[str, Any] = {
        "named": named,
        "invented": [name for name in named if name not in objects],
        "found": len(objects.intersection(named)),
        "there": len(objects),
        "words": len(answer.split()),
    }
    return {"exact": exact(answer, *expected) if any(expected) else float(objects == set(named))} | scores


def pope_scores(answers: Sequence[tuple[str | None, str]]) -> dict[str, Any]:
    """POPE's scores of yes-no questions, from pairs of what was said (yes, no or None) and what is right (yes or no).

    An answer that says neither is wrong, and counts as not yes. Ratios are None where there is nothing to divide by.
    """
    said_yes, right_yes = (sum(pair[side] == "yes" for pair in answers) for side in (0, 1))
    correct, true_yes = sum(said == right for said, right in answers), answers.count(("yes", "yes"))
    return {
        "n": len(answers),
        "correct": correct,
        "accuracy": ratio(correct, len(answers)),
        "precision": ratio(true_yes, said_yes),
        "recall": ratio(true_yes, right_yes),
        "f1": ratio(2 * true_yes, said_yes + right_yes),
        "yes_ratio": ratio(said_yes, len(answers)),
        "neither": sum(said is None for said, _ in answers),
    }


def ratio(part: float, whole: float) -> float | None:
    """The quotient, or None where ``whole`` is 0."""
    return part / whole if whole else None
