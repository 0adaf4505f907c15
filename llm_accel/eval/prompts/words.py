"""Words for keys and lists: single ones, and pairs such as ``quiet-harbor`` where many different ones are needed.

No word contains another one, so that an answer holds a word only if it names it; the same then holds for pairs.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

from llm_accel.errors import ConfigError
from llm_accel.eval.prompts import grammar

_ADJECTIVES = """
absent active amused ancient annual bitter bold bouncy broad calm careful cheerful civil common crisp curious curly
dapper dazzling deep dizzy dusty eager early elegant empty equal faint fancy fearless fluffy formal fresh frosty funny
fuzzy giant giddy glossy grand grateful greedy handy harsh hasty hollow honest huge humble hungry idle jolly jumpy keen
kind lively lonely loud loyal lucky mellow merry mighty modern muddy narrow neat nimble noble odd pale patient perky
plain playful pleasant polite proud quaint quick rapid rare raspy rich robust rough royal rural rusty secret shallow
shiny shy silent silly simple sleepy slim smooth snug sober solid sour spicy steep sticky stormy sturdy sunny super
sweet swift tame tasty tender thirsty tidy tiny tired tough trusty unique upbeat urban useful vague vast vivid warlike
weary wicked wide wild wise witty wobbly worthy yearly young zany zesty
"""
ADJECTIVES: tuple[str, ...] = tuple(_ADJECTIVES.split())

_SINGLE = {*ADJECTIVES, *grammar.common_words(), *grammar.TRAIN_KEYS, *grammar.TEST_KEYS}
SINGLE: tuple[str, ...] = tuple(
    sorted(word for word in _SINGLE if not any(word in other for other in _SINGLE if other != word))
)
_FIRST = tuple(word for word in SINGLE if word in ADJECTIVES)
_SECOND = tuple(word for word in SINGLE if word in {*grammar.value_words(), *grammar.TRAIN_KEYS, *grammar.TEST_KEYS})
PAIRS = len(_FIRST) * len(_SECOND)


def pair(number: int) -> str:
    """One of the pairs, ``number`` from 0 to ``PAIRS`` - 1."""
    first, second = divmod(number, len(_SECOND))
    return f"{_FIRST[first]}-{_SECOND[second]}"


def draw_pairs(rng: random.Random, count: int) -> list[str]:
    """``count`` different pairs, or all there are."""
    return [pair(number) for number in rng.sample(range(PAIRS), min(count, PAIRS))]


def read_words(file: str) -> tuple[str, ...]:
    """Different words of a text file, in its order.

    Raises:
        ConfigError: it cannot be read, or holds fewer than 100 words.
    """
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--words {file!r} cannot be read: {error}.") from error
    words = tuple(dict.fromkeys(re.findall(r"[^\W\d_]+(?:-[^\W\d_]+)*", text)))
    if len(words) < 100:
        raise ConfigError(f"--words {file!r} holds {len(words)} different words; give at least 100.")
    return words
