"""Words for keys and lists: single ones, and pairs such as ``quiet-harbor`` where many different ones are needed.

No word contains another one, so that an answer holds a word only if it names it; the same then holds for pairs.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

from llm_accel.errors import ConfigError
from llm_accel.eval.prompts import grammar

ADJECTIVES: tuple[str, ...] = grammar.WORDS["ADJECTIVES"]

_SINGLE = {*ADJECTIVES, *grammar.common_words(), *grammar.TRAIN_KEYS, *grammar.TEST_KEYS}
SINGLE: tuple[str, ...] = tuple(
    sorted(word for word in _SINGLE if not any(word in other for other in _SINGLE if other != word))
)
_FIRST = tuple(word for word in SINGLE if word in ADJECTIVES)
_SECOND = tuple(word for word in SINGLE if word in {*grammar.value_words(), *grammar.TRAIN_KEYS, *grammar.TEST_KEYS})
PAIRS = len(_FIRST) * len(_SECOND)


def word_pair(number: int) -> str:
    """One of the pairs, ``number`` from 0 to ``PAIRS`` - 1."""
    first, second = divmod(number, len(_SECOND))
    return f"{_FIRST[first]}-{_SECOND[second]}"


def draw_pairs(rng: random.Random, count: int) -> list[str]:
    """``count`` different pairs, or all there are."""
    return [word_pair(number) for number in rng.sample(range(PAIRS), min(count, PAIRS))]


def read_words(file: str) -> tuple[str, ...]:
    """Different words of a text file, in its order. Raises :class:`ConfigError`: it cannot be read, or holds fewer than
    100 words."""
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--words {file!r} cannot be read: {error}.") from error
    words = tuple(dict.fromkeys(re.findall(r"[^\W\d_]+(?:-[^\W\d_]+)*", text)))
    if len(words) < 100:
        raise ConfigError(f"--words {file!r} holds {len(words)} different words; give at least 100.")
    return words
