"""What a task puts into one prompt, and how pieces of token ids are cut and put together."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
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
        prefix: how the answer begins; None: the model begins it by itself.
        answers: strings that the answer should hold, or for questions about documents one of them.
        intro: what stands before the context.
        on_line: whether the question begins a line; else it follows a sentence.
        asked, others: pieces of the context whose places the prompt should tell.
    """

    fill: Callable[[int], list[Piece]]
    question: str
    prefix: str | None
    answers: tuple[str, ...]
    intro: str = ""
    on_line: bool = True
    asked: tuple[Piece, ...] = ()
    others: tuple[Piece, ...] = ()


class Builder(Protocol):
    """Draws the puzzles of a task."""

    def draw(self, rng: random.Random, sample: int, length: int) -> Puzzle:
        """The puzzle of a sample; ``length``: tokens of prompt and answer together."""


def tokens(pieces: Iterable[Piece]) -> int:
    """Tokens of all pieces."""
    return sum(map(len, pieces))


def cut(pieces: Sequence[Piece], room: int) -> tuple[Piece, list[Piece]]:
    """The last ``room`` tokens: what is left of a piece that loses its head (maybe nothing), and the whole ones behind.

    Raises:
        NoRoom: ``room`` is negative.
    """
    if room < 0:
        raise NoRoom(-room)
    excess, first = tokens(pieces) - room, 0
    while first < len(pieces) and excess >= len(pieces[first]):
        excess -= len(pieces[first])
        first += 1
    return (pieces[first][excess:], list(pieces[first + 1 :])) if excess else ((), list(pieces[first:]))


def exactly(pieces: Sequence[Piece], room: int) -> list[Piece]:
    """The last ``room`` tokens; the first piece may lack its head."""
    head, whole = cut(pieces, room)
    return [head, *whole] if head else whole


def taken(stream: Iterator[Piece], room: int) -> list[Piece]:
    """Pieces of an endless stream, at least ``room`` tokens together."""
    pieces: list[Piece] = []
    total = 0
    while total < room:
        pieces.append(next(stream))
        total += len(pieces[-1])
    return pieces


def drawn(stream: Iterator[Piece], room: int) -> list[Piece]:
    """Pieces of an endless stream, ``room`` tokens together; the first one may lack its head."""
    return exactly(taken(stream, room), room)


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
