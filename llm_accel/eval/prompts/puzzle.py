"""What a task puts into one prompt, and what the builders of all tasks share."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

Piece = Sequence[int]
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


class NoRoom(Exception):
    """A context cannot be made as short as asked for; ``missing``: tokens that it lacks at least."""

    def __init__(self, missing: int) -> None:
        super().__init__(missing)
        self.missing = missing


@dataclass(frozen=True)
class Puzzle:
    """One prompt before it has its length: intro, context, question, answer prefix.

    Attributes:
        fill: the context in pieces of token ids, exactly as many tokens as asked for; raises :class:`NoRoom`.
        prefix: how the answer begins.
        answers: strings that the answer should hold, or for questions about documents one of them.
        on_line: whether the question begins a line; else it follows a sentence.
    """

    intro: str
    fill: Callable[[int], list[Piece]]
    question: str
    prefix: str
    answers: tuple[str, ...]
    on_line: bool = True


class Builder(Protocol):
    """Draws the puzzles of a task."""

    def draw(self, rng: random.Random, sample: int, length: int) -> Puzzle:
        """The puzzle of a sample; ``length``: tokens of prompt and answer together."""


def tokens(pieces: Iterable[Piece]) -> int:
    """Tokens of all pieces."""
    return sum(map(len, pieces))


def exactly(pieces: Sequence[Piece], room: int) -> list[Piece]:
    """The last ``room`` tokens: whole pieces are dropped in front, then the first one loses its head.

    Raises:
        NoRoom: ``room`` is negative.
    """
    if room < 0:
        raise NoRoom(-room)
    excess, kept = tokens(pieces) - room, list(pieces)
    dropped = 0
    while dropped < len(kept) and excess >= len(kept[dropped]):
        excess -= len(kept[dropped])
        dropped += 1
    return [kept[dropped][excess:], *kept[dropped + 1 :]] if dropped < len(kept) else []


def drawn(stream: Iterable[Piece], room: int) -> list[Piece]:
    """Pieces of an endless stream, ``room`` tokens together; the first one may lack its head."""
    pieces: list[Piece] = []
    total = 0
    for piece in stream:
        if total >= room:
            break
        pieces.append(piece)
        total += len(piece)
    return exactly(pieces, room)


def inserted(pieces: Sequence[Piece], at: Sequence[int], inside: Sequence[Piece]) -> list[Piece]:
    """``pieces`` with each of ``inside`` in front of the piece whose number ``at`` gives, ascending."""
    mixed = list(pieces)
    for moved, (place, piece) in enumerate(zip(at, inside, strict=True)):
        mixed.insert(place + moved, piece)
    return mixed


def places(rng: random.Random, pieces: Sequence[Piece], count: int) -> list[int]:
    """Random places between pieces, ascending, different where there are enough."""
    size = max(len(pieces), 1)
    return sorted(rng.sample(range(size), count) if count <= size else rng.choices(range(size), k=count))
