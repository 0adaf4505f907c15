"""Needles: values of keys, hidden in prose, in noise or among other needles, and the question about some of them.

Two wordings: RULER's own (Hsieh et al. 2024, arXiv 2404.06654), and the shorter one that the bundled model was trained
on. Two ways of placing them: at random as RULER does, or the asked ones at a depth of the haystack.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, repeat
from typing import Literal

from llm_accel.eval.prompts import grammar, template
from llm_accel.eval.prompts.encoding import Encoder
from llm_accel.eval.prompts.grammar import Kind
from llm_accel.eval.prompts.haystack import Haystack
from llm_accel.eval.prompts.template import NOISE, PromptTemplate, Segment
from llm_accel.eval.prompts.words import draw_pairs

Wording = Literal["ruler", "bundled"]
WORDINGS: tuple[Wording, ...] = ("ruler", "bundled")
Hay = Literal["noise", "essay", "needles"]
_DEPTHS = tuple(round(100 * i / 39) for i in range(40))
_DISTRACTORS = 128  # needles that a haystack of needles is drawn from at a time


@dataclass(frozen=True)
class Needles:
    """What is hidden and what is asked for."""

    keys: int = 1  # keys that belong to the task
    values: int = 1  # values of each of them
    queries: int = 1  # keys that are asked for
    distractors: int = 0  # additional keys with one value each that are not asked for
    key_kind: Kind = "word"
    value_kind: Kind = "number"
    hay: Hay = "essay"  # what the needles are hidden in: one repeated passage, prose, or other needles


@dataclass(frozen=True)
class NeedleBuilder:
    """Prompts of one kind of needles. ``prose``: sentences to hide them in, where the hay is an essay."""

    needles: Needles
    wording: Wording
    encoder: Encoder
    prose: Haystack

    def draw(self, rng: random.Random, sample: int, length: int) -> PromptTemplate:
        """As in RULER: random keys are asked for, and needles are at random positions."""
        keys, values = self._pairs(rng)
        needles = [self._text(k, v) for k, own in zip(keys, values, strict=True) for v in own]
        rng.shuffle(needles)
        asked = rng.sample(range(len(keys)), self.needles.queries)
        answers = tuple(value for i in asked for value in values[i])
        return self._template([keys[i] for i in asked], answers, lambda size: self._fill(rng, size, needles, set(keys)))

    def draw_at(self, rng: random.Random, depth: float) -> PromptTemplate:
        """The first needle that is asked for is at ``depth`` percent of the haystack, further ones are spread over the
        rest, and the others are anywhere else."""
        keys, values = self._pairs(rng)
        texts = [[self._text(k, v) for v in own] for k, own in zip(keys, values, strict=True)]
        queries = self.needles.queries
        asked, others = ([text for own in part for text in own] for part in (texts[:queries], texts[queries:]))
        segments = self._encode([*asked, *others])
        hidden, rest = tuple(segments[: len(asked)]), tuple(segments[len(asked) :])
        answers = tuple(value for own in values[:queries] for value in own)
        return self._template(
            keys[:queries], answers, lambda size: self._fill_at(rng, size, depth, hidden, rest), hidden, rest
        )

    def _template(
        self,
        keys: list[str],
        answers: tuple[str, ...],
        fill: Callable[[int], list[Segment]],
        asked: tuple[Segment, ...] = (),
        others: tuple[Segment, ...] = (),
    ) -> PromptTemplate:
        kind, several = self.needles.value_kind, len(answers) > 1
        if self.wording == "ruler":
            intro, prefix = _intro(kind, several), _prefix(keys, kind, several)
            question = grammar.question_text(keys, kind, 1 + several, last=", and ")
        else:
            intro, prefix = "", grammar.answer_prefix(keys, kind, 1 + several)
            question = grammar.question_text(keys, kind, 1 + several)
        return PromptTemplate(fill, question, prefix, answers, intro, self.wording == "ruler", asked, others)

    def _pairs(self, rng: random.Random) -> tuple[list[str], list[list[str]]]:
        """Keys, and the values of each, all different from each other."""
        what = self.needles
        keys = self._keys(rng, what.keys + what.distractors)
        used = set(keys)

        def value() -> str:
            while (found := grammar.make_value(rng, what.value_kind)) in used:
                pass
            used.add(found)
            return found

        return keys, [[value() for _ in range(what.values if i < what.keys else 1)] for i in range(len(keys))]

    def _keys(self, rng: random.Random, count: int) -> list[str]:
        kind = self.needles.key_kind
        if kind == "word" and self.wording == "ruler":
            return draw_pairs(rng, count)
        if kind == "word" and self.needles.hay == "needles":  # the pool of words is too small for a haystack of them
            kind = "number"
        return grammar.make_keys(rng, count, kind)

    def _text(self, key: str, value: str) -> str:
        return grammar.needle_text(key, value, self.needles.value_kind)

    def _fill(self, rng: random.Random, size: int, needles: list[str], used: set[str]) -> list[Segment]:
        """Filler with the needles at random positions: between lines, or in prose at one of RULER's 40 depths."""
        depths = sorted(rng.sample(_DEPTHS, len(needles)))
        hidden = self._encode(needles)
        stream = self._filler(rng, used)
        if self.needles.hay != "essay":
            filler = template.take_tokens(stream, size - template.count_tokens(hidden))
            next(stream)  # draws from rng: without it, prompts would not be those of earlier versions
            return template.insert_segments(filler, template.random_positions(rng, filler, len(hidden)), hidden)
        last: list[Segment] = []
        if self.wording == "ruler":  # the question begins a line
            ends = hidden.pop() if depths[-1] == 100 else next(stream)
            last = [self.encoder.continuation(self.encoder.decode(ends).strip() + "\n")]
        filler = template.take_tokens(stream, size - template.count_tokens(hidden) - template.count_tokens(last))
        at = [len(filler) * depth // 100 for depth in depths[: len(hidden)]]
        return [*template.insert_segments(filler, at, hidden), *last]

    def _fill_at(
        self, rng: random.Random, size: int, depth: float, asked: Sequence[Segment], others: Sequence[Segment]
    ) -> list[Segment]:
        """Sentences after the end of one, with needles at their boundaries: depth 0 is the first boundary, right after
        that end, depth 100 the last one, right before the question."""
        left = size - template.count_tokens(asked) - template.count_tokens(others)
        head, sentences = template.cut_head(template.take_segments(self.prose.draw(rng), left), left)
        ends = list(accumulate(map(len, sentences), initial=len(head)))  # filler tokens before each boundary
        targets = [left * (depth + i * (100 - depth) / len(asked)) / 100 for i in range(len(asked))]
        asked_at = [_boundary(ends, target) for target in targets]
        others_at = _elsewhere(len(ends), set(asked_at), len(others), rng)
        pairs = [list(zip(asked_at, asked, strict=True)), list(zip(others_at, others, strict=True))]
        first, second = pairs if depth < 100 else pairs[::-1]  # at depth 100 the asked one is the last one
        ordered = sorted([*first, *second], key=lambda pair: pair[0])
        at, needles = [at for at, _ in ordered], [segment for _, segment in ordered]
        return [head, *template.insert_segments(sentences, at, needles)]

    def _filler(self, rng: random.Random, used: set[str]) -> Iterator[Segment]:
        if self.needles.hay == "noise":
            return repeat(self._noise)
        return iter(self.prose.draw(rng)) if self.needles.hay == "essay" else self._other_needles(rng, used)

    def _other_needles(self, rng: random.Random, used: set[str]) -> Iterator[Segment]:
        """Needles with keys that are not asked for."""
        while True:
            keys = [key for _ in range(_DISTRACTORS) for key in self._keys(rng, 1) if key not in used]
            yield from self._encode([self._text(key, grammar.make_value(rng, self.needles.value_kind)) for key in keys])

    def _encode(self, sentences: list[str]) -> list[Segment]:
        """Sentences as they appear in the context: each on a line of its own, or one after the other in prose."""
        if self.wording == "ruler" and self.needles.hay != "essay":
            return list(self.encoder.lines([sentence + "\n" for sentence in sentences]))
        return list(self.encoder.continuations(sentences))

    @cached_property
    def _noise(self) -> Segment:
        return self._encode([NOISE])[0]


def _boundary(ends: Sequence[int], target: float) -> int:
    """Index of the boundary nearest to ``target`` filler tokens."""
    right = min(bisect.bisect_left(ends, target), len(ends) - 1)
    left = max(right - 1, 0)
    return left if target - ends[left] <= ends[right] - target else right


def _elsewhere(boundaries: int, used: set[int], count: int, rng: random.Random) -> list[int]:
    """Boundaries for the other needles: random, different, none of the asked needles' where there are enough."""
    free = [slot for slot in range(boundaries) if slot not in used]
    return rng.sample(free, count) if len(free) >= count else [rng.randrange(boundaries) for _ in range(count)]


def _intro(kind: Kind, several: bool) -> str:
    begin, end = (f"Some special magic {kind}s are", "s") if several else (f"A special magic {kind} is", "")
    return (
        f"{begin} hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {kind}{end} afterwards.\n"
    )


def _prefix(keys: list[str], kind: Kind, several: bool) -> str:
    what, verb = (f"The special magic {kind}s", "are") if several else (f"The special magic {kind}", "is")
    return f"{what} for {grammar.join_list(keys, ', and ')} mentioned in the provided text {verb}"
