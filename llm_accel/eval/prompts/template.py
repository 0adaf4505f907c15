"""The parts of one prompt, and how segments of token ids are cut and joined."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

Segment = Sequence[int]
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


class TooShortError(Exception):
    """A context cannot be made as short as asked for; ``missing``: number of tokens it needs in addition, at least."""

    def __init__(self, missing: int) -> None:
        super().__init__(missing)
        self.missing = missing


@dataclass(frozen=True)
class PromptTemplate:
    """The parts of one prompt before its length is fixed: intro, context, question, answer prefix."""

    fill: Callable[[int], list[Segment]]  # the context, exactly as many tokens as asked for; raises TooShortError
    question: str
    prefix: str | None  # beginning of the answer; None: the model starts it
    answers: tuple[str, ...]  # strings that the answer should hold, or for questions about documents one of them
    intro: str = ""  # what stands before the context
    on_line: bool = True  # whether the question begins a line; else it follows a sentence
    asked: tuple[Segment, ...] = ()  # the needles asked for, whose positions the prompt records
    others: tuple[Segment, ...] = ()  # the other needles, likewise


class Builder(Protocol):
    """Draws the prompts of a task."""

    def draw(self, rng: random.Random, sample: int, length: int) -> PromptTemplate:
        """The parts of a sample's prompt; ``length``: tokens of prompt and answer together."""


def count_tokens(segments: Iterable[Segment]) -> int:
    """Tokens of all segments."""
    return sum(map(len, segments))


def cut_head(segments: Sequence[Segment], size: int) -> tuple[Segment, list[Segment]]:
    """The last ``size`` tokens: the rest of the segment that loses its head, which may be empty, and all after it.
    Raises :class:`TooShortError`: ``size`` is negative."""
    if size < 0:
        raise TooShortError(-size)
    excess, first = count_tokens(segments) - size, 0
    while first < len(segments) and excess >= len(segments[first]):
        excess -= len(segments[first])
        first += 1
    return (segments[first][excess:], list(segments[first + 1 :])) if excess else ((), list(segments[first:]))


def last_tokens(segments: Sequence[Segment], size: int) -> list[Segment]:
    """The last ``size`` tokens; the first segment may lack its head."""
    head, whole = cut_head(segments, size)
    return [head, *whole] if head else whole


def take_segments(stream: Iterator[Segment], size: int) -> list[Segment]:
    """Segments of an endless stream, at least ``size`` tokens in total."""
    segments: list[Segment] = []
    total = 0
    while total < size:
        segments.append(next(stream))
        total += len(segments[-1])
    return segments


def take_tokens(stream: Iterator[Segment], size: int) -> list[Segment]:
    """Segments of an endless stream, exactly ``size`` tokens in total; the first one may lack its head."""
    return last_tokens(take_segments(stream, size), size)


def insert_segments(segments: Sequence[Segment], at: Sequence[int], inside: Sequence[Segment]) -> list[Segment]:
    """``segments`` with each of ``inside`` inserted before the segment whose index ``at`` gives, ascending."""
    mixed = list(segments)
    for moved, (index, segment) in enumerate(zip(at, inside, strict=True)):
        mixed.insert(index + moved, segment)
    return mixed


def random_positions(rng: random.Random, segments: Sequence[Segment], count: int) -> list[int]:
    """Random positions between segments, ascending, distinct where there are enough."""
    size = max(len(segments), 1)
    return sorted(rng.sample(range(size), count) if count <= size else rng.choices(range(size), k=count))
