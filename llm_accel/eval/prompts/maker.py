"""Prompts of exactly the length asked for, assembled in token ids.

    prefix | intro | context | question | suffix | answer prefix
    <--- context_length --->
    <--------------- answer_start ------------->

Prefix and suffix are the chat template's. A context is made of pieces that are encoded once; where it is longer than
needed, its first piece loses its head.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from llm_accel.errors import ConfigError
from llm_accel.eval.grid import Place
from llm_accel.eval.prompts.encoding import Encoder, Frame
from llm_accel.eval.prompts.haystack import Haystack
from llm_accel.eval.prompts.puzzle import NoRoom, Puzzle


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        place: of the grid.
        ids: the whole prompt.
        context_length: tokens before the question; the part that query-agnostic compression sees.
        answer_start: tokens before the answer prefix.
        new_tokens: tokens to generate at most.
        expected: strings that the answer should hold.
        needles: first token of each asked needle in ``ids``, in the order of ``expected``.
        others: first token of each other needle.
    """

    place: Place
    ids: tuple[int, ...]
    context_length: int
    answer_start: int
    new_tokens: int
    expected: tuple[str, ...]
    needles: tuple[int, ...] = ()
    others: tuple[int, ...] = ()

    @property
    def key(self) -> tuple[int, Any, int]:
        """Its place, as records have it."""
        return self.place.key

    def digest(self) -> str:
        """Hash of the ids, 16 hex digits."""
        return hashlib.sha256(",".join(map(str, self.ids)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class PromptMaker(ABC):
    """Makes the prompts of a run; the same settings and seed give the same ids in any order, shard or process."""

    encoder: Encoder
    frame: Frame
    haystack: Haystack

    @abstractmethod
    def puzzle(self, place: Place) -> Puzzle:
        """What stands in the prompt of a place."""

    @abstractmethod
    def new_tokens(self, place: Place) -> int:
        """Tokens to generate at most."""

    def length(self, place: Place) -> int:
        """Tokens of the prompt of a place."""
        return place.length

    def label(self, place: Place) -> str:
        """What an error calls the prompt."""
        return str(place.row)

    def make(self, place: Place) -> Prompt:
        """The prompt of a place.

        Raises:
            ConfigError: the length has no room for what must stand in it.
        """
        puzzle = self.puzzle(place)
        head = [*self.frame.prefix, *self.encoder.start(puzzle.intro)]
        (question,) = (self.encoder.lines if puzzle.on_line else self.encoder.continuations)([puzzle.question])
        tail, prefix = [*question, *self.frame.suffix], []
        if puzzle.prefix is not None:
            prefix = self.encoder.answer_prefix(puzzle.prefix, begins=self.frame.chat)
        wanted = self.length(place)
        try:
            context = puzzle.fill(wanted - len(head) - len(tail) - len(prefix))
        except NoRoom as error:
            raise ConfigError(
                f"--lengths {place.length}: {self.label(place)} needs more; give at least "
                f"{place.length + error.missing}."
            ) from error
        ids, starts = list(head), {}
        for piece in context:
            starts[id(piece)] = len(ids)
            ids += piece
        context_length = len(ids)
        ids += tail
        answer_start = len(ids)
        ids += prefix
        if len(ids) != wanted:
            raise RuntimeError(f"assembled {len(ids)} tokens instead of {wanted}")
        return Prompt(
            place=place,
            ids=tuple(ids),
            context_length=context_length,
            answer_start=answer_start,
            new_tokens=self.new_tokens(place),
            expected=puzzle.answers,
            needles=tuple(starts[id(piece)] for piece in puzzle.asked),
            others=tuple(starts[id(piece)] for piece in puzzle.others),
        )

    def digest(self, lengths: Iterable[int], rows: Sequence[Any]) -> str:
        """Hash over the first prompt of every cell, 16 hex digits."""
        digest = hashlib.sha256()
        for length in lengths:
            for row in rows:
                digest.update(self.make(Place(length, row, 0)).digest().encode())
        return digest.hexdigest()[:16]
