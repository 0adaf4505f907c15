"""Words that occur most often: in a numbered list (common words), or among coded words with counts by a power law."""

from __future__ import annotations

import bisect
import math
import random
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from llm_accel.errors import ConfigError
from llm_accel.eval.prompts.encoding import Encoder
from llm_accel.eval.prompts.template import PromptTemplate, Segment, TooShortError, last_tokens
from llm_accel.eval.prompts.words import SINGLE, draw_pairs

Word = TypeVar("Word")

_COMMON = 10
_SHORT = 4096  # below this length words are repeated less often
_ENTRY_TOKENS = 3  # of an entry of the list, at least
_LIST_INTRO = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
_LIST_QUESTION = f"Question: What are the {_COMMON} most common words in the above list?"
_LIST_PREFIX = f"Answer: The top {_COMMON} words that appear most often in the list are:"

_LETTERS, _ALPHA, _ASKED, _MINIMUM = 6, 2.0, 3, 8
_DOTS = "..."
_CODED_INTRO = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words."
)
_CODED_QUESTION = (
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
_CODED_PREFIX = "Answer: According to the coded text above, the three most frequently appeared words are:"


@dataclass(frozen=True)
class ListBuilder:
    """Common words: ten of them stand 30 times in a numbered list, all others 3 times, after a solved example.

    ``words``: the user's own; else there are as many as the list may need.
    """

    encoder: Encoder
    words: tuple[str, ...] = ()
    _numbers: list[Segment] = field(default_factory=list)

    def draw(self, rng: random.Random, sample: int, length: int) -> PromptTemplate:
        """All words in the order in which the list takes them; the ten common ones first."""
        often, seldom = (30, 3) if length >= _SHORT else (6, 1)
        pool = self.words or SINGLE
        shown = rng.sample(pool, 40 if length >= _SHORT else 20)
        entries = _shuffled(rng, shown[:_COMMON], shown[_COMMON:], *((10, 3) if length >= _SHORT else (3, 1)))
        solved = f"{_LIST_QUESTION} {_LIST_PREFIX} {_numbered(shown[:_COMMON])}\n"
        intro = f"{_LIST_INTRO}{_numbered(entries)}\n{solved}{_LIST_INTRO}"
        words = rng.sample(pool, len(pool))
        if not self.words and self._totals(words, often, seldom)[-1] < length - len(self.encoder.start(intro)):
            words = draw_pairs(rng, length // (_ENTRY_TOKENS * seldom))
        return PromptTemplate(
            intro=intro,
            fill=lambda size: self._fill(rng, size, words, often, seldom),
            question=_LIST_QUESTION,
            prefix=_LIST_PREFIX,
            answers=tuple(words[:_COMMON]),
        )

    def _fill(self, rng: random.Random, size: int, words: list[str], often: int, seldom: int) -> list[Segment]:
        """As many words as ``size`` tokens hold; the excess of the last one is cut off at the head of the list."""
        end = _line_end(self.encoder)
        total = self._totals(words, often, seldom)
        wanted = size - len(end)
        others = int(np.searchsorted(total, wanted))
        if total[0] > wanted:
            raise TooShortError(int(total[0]) - wanted)
        if others == len(total):
            raise ConfigError(
                f"cwe: a list of {wanted} tokens needs more than {len(words)} different words; "
                "give a text file with more of them as --words."
            )
        encoded = self.encoder.continuations(words[: _COMMON + others])
        listed = _shuffled(rng, encoded[:_COMMON], encoded[_COMMON:], often, seldom)
        segments = [[*number, *word] for number, word in zip(self._numbers, listed, strict=False)]
        return [*last_tokens(segments, wanted), end]

    def _totals(self, words: list[str], often: int, seldom: int) -> npt.NDArray[np.int64]:
        """Tokens of the list with no other word than the common ones, with one other, and so on."""
        sizes = np.array([len(ids) for ids in self.encoder.continuations(words)]) * seldom
        sizes[:_COMMON] *= often // seldom
        entries = _COMMON * often + seldom * np.arange(len(words) - _COMMON + 1)
        numbers = np.cumsum([len(ids) for ids in self._numbered_to(int(entries[-1]))])[entries - 1]
        return np.asarray(numbers + np.cumsum(sizes)[_COMMON - 1 :])

    def _numbered_to(self, count: int) -> list[Segment]:
        """Ids of `` 1.``, `` 2.`` and so on, kept for the next prompt."""
        self._numbers.extend(self.encoder.continuations([f"{i + 1}." for i in range(len(self._numbers), count)]))
        return self._numbers[:count]


@dataclass(frozen=True)
class CodedBuilder:
    """Frequent words: made-up words of six letters; the k-th most frequent one is one k²-th of the most frequent,
    which is a row of dots and does not count."""

    encoder: Encoder

    def draw(self, rng: random.Random, sample: int, length: int) -> PromptTemplate:
        """Words by rank; the second to the fourth are asked for."""
        words: dict[str, None] = {_DOTS: None}
        while len(words) < max(length // 50, _MINIMUM):
            words["".join(rng.choices(string.ascii_lowercase, k=_LETTERS))] = None
        ranked = list(words)
        return PromptTemplate(
            intro=_CODED_INTRO,
            fill=lambda size: self._fill(rng, size, ranked),
            question=_CODED_QUESTION,
            prefix=_CODED_PREFIX,
            answers=tuple(ranked[1 : 1 + _ASKED]),
        )

    def _fill(self, rng: random.Random, size: int, ranked: list[str]) -> list[Segment]:
        encoded, end = self.encoder.continuations(ranked), _line_end(self.encoder)
        wanted = size - len(end)
        if wanted < 1:
            raise TooShortError(1 - wanted)
        sizes = np.array([len(ids) for ids in encoded])
        shares = np.arange(1, len(ranked) + 1) ** -_ALPHA / (math.pi**2 / 6)  # the sum over all ranks is zeta(2)
        scale = bisect.bisect_left(range(16 * size), wanted, key=lambda n: int((n * shares).astype(int) @ sizes))
        ranks = np.repeat(np.arange(len(ranked)), (scale * shares).astype(int)).tolist()
        rng.shuffle(ranks)
        segments = last_tokens([encoded[rank] for rank in ranks], wanted)
        left = Counter(ranks[len(ranks) - len(segments) + 1 :])  # the first segment may have lost its head
        if left[_ASKED] <= max((left[rank] for rank in range(_ASKED + 1, len(ranked))), default=0):
            raise TooShortError(1)
        return [*segments, end]


def _shuffled(
    rng: random.Random, common: Sequence[Word], others: Sequence[Word], often: int, seldom: int
) -> list[Word]:
    words = [*common] * often + [*others] * seldom
    rng.shuffle(words)
    return words


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def _line_end(encoder: Encoder) -> Segment:
    """Ids of a newline behind a word."""
    return encoder.behind("a", ["\n"])[0]
