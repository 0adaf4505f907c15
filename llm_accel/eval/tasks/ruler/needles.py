"""The eight needle tasks: values of keys, hidden in noise, in prose, or among other needles.

Two wordings: RULER's own, and for the bundled model the one it was trained on, which is ``llm-accel needle``'s.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from typing import Literal

from llm_accel.eval.prompts import grammar
from llm_accel.eval.prompts.encoding import Encoder
from llm_accel.eval.prompts.haystack import Haystack
from llm_accel.eval.prompts.puzzle import NOISE, Piece, Puzzle, drawn, inserted, places, tokens
from llm_accel.eval.tasks.ruler.tasks import Task
from llm_accel.eval.tasks.ruler.words import draw_pairs

Wording = Literal["ruler", "bundled"]
WORDINGS: tuple[Wording, ...] = ("ruler", "bundled")
_DEPTHS = tuple(round(100 * i / 39) for i in range(40))
_DISTRACTORS = 128  # needles that a haystack of needles is drawn from at a time


@dataclass(frozen=True)
class NeedleBuilder:
    """Puzzles of one needle task. ``prose``: sentences for the tasks that hide needles in an essay."""

    task: Task
    wording: Wording
    encoder: Encoder
    prose: Haystack

    def draw(self, rng: random.Random, sample: int, length: int) -> Puzzle:
        """Keys, values and which keys are asked for."""
        task, kind = self.task, self.task.value_kind
        keys = self._keys(rng, task.keys)
        values = [[grammar.make_value(rng, kind) for _ in range(task.values)] for _ in keys]
        needles = [grammar.needle_text(k, v, kind) for k, own in zip(keys, values, strict=True) for v in own]
        rng.shuffle(needles)
        asked = rng.sample(range(len(keys)), task.queries)
        names = [keys[i] for i in asked]
        several = task.queries * task.values > 1
        ruler = self.wording == "ruler"
        return Puzzle(
            intro=_intro(kind, several) if ruler else "",
            fill=lambda room: self._fill(rng, room, needles, set(keys)),
            question=_question(names, kind, several) if ruler else grammar.question_text(names, kind, task.values),
            prefix=_prefix(names, kind, several) if ruler else grammar.answer_prefix(names, kind, task.values),
            answers=tuple(value for i in asked for value in values[i]),
            on_line=ruler,
        )

    def _keys(self, rng: random.Random, count: int) -> list[str]:
        if self.task.key_kind != "word":
            return grammar.make_keys(rng, count, self.task.key_kind)
        if self.wording == "bundled":  # its pool of words is too small for a haystack of needles
            return grammar.make_keys(rng, count, "number" if self.task.hay == "needles" else "word")
        return draw_pairs(rng, count)

    def _fill(self, rng: random.Random, room: int, needles: list[str], taken: set[str]) -> list[Piece]:
        """Filler with the needles at random places: between lines, or in prose at one of RULER's 40 depths."""
        depths = sorted(rng.sample(_DEPTHS, len(needles)))
        hidden = self._encode(needles)
        stream = self._filler(rng, taken)
        if self.task.hay != "essay":
            filler = drawn(stream, room - tokens(hidden))
            return inserted(filler, places(rng, filler, len(hidden)), hidden)
        last: list[Piece] = []
        if self.wording == "ruler":  # the question begins a line
            ends = hidden.pop() if depths[-1] == 100 else next(stream)
            last = [self.encoder.continuation(self.encoder.decode(ends).strip() + "\n")]
        filler = drawn(stream, room - tokens(hidden) - tokens(last))
        return [*inserted(filler, [len(filler) * d // 100 for d in depths[: len(hidden)]], hidden), *last]

    def _filler(self, rng: random.Random, taken: set[str]) -> Iterator[Piece]:
        if self.task.hay == "noise":
            return repeat(self._noise)
        return iter(self.prose.draw(rng)) if self.task.hay == "essay" else self._other_needles(rng, taken)

    def _other_needles(self, rng: random.Random, taken: set[str]) -> Iterator[Piece]:
        """Needles with keys that are not asked for."""
        kind = self.task.value_kind
        while True:
            keys = [key for _ in range(_DISTRACTORS) for key in self._keys(rng, 1) if key not in taken]
            yield from self._encode([grammar.needle_text(key, grammar.make_value(rng, kind), kind) for key in keys])

    def _encode(self, sentences: list[str]) -> list[Piece]:
        """Sentences as they stand in the context: each on a line of its own, or one behind the other in prose."""
        if self.wording == "ruler" and self.task.hay != "essay":
            return list(self.encoder.lines([sentence + "\n" for sentence in sentences]))
        return list(self.encoder.continuations(sentences))

    @cached_property
    def _noise(self) -> Piece:
        return self._encode([NOISE])[0]


def _intro(kind: grammar.Kind, several: bool) -> str:
    begin, end = (f"Some special magic {kind}s are", "s") if several else (f"A special magic {kind} is", "")
    return (
        f"{begin} hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {kind}{end} afterwards.\n"
    )


def _question(keys: list[str], kind: grammar.Kind, several: bool) -> str:
    what = f"What are all the special magic {kind}s" if several else f"What is the special magic {kind}"
    return f"{what} for {_listed(keys)} mentioned in the provided text?"


def _prefix(keys: list[str], kind: grammar.Kind, several: bool) -> str:
    what, verb = (f"The special magic {kind}s", "are") if several else (f"The special magic {kind}", "is")
    return f"{what} for {_listed(keys)} mentioned in the provided text {verb}"


def _listed(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + ", and " + keys[-1]
