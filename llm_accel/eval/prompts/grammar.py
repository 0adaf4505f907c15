"""The built-in haystack: filler grammar, needle and question texts, key and value pools.

Everything here is plain text made with :class:`random.Random`, so a seed gives the same haystack on any machine and the
same texts serve any model. The texts follow RULER's needle tasks (Hsieh et al. 2024, arXiv:2404.06654), shortened so
that question, answer prefix and chat tag stay below 32 tokens of the bundled tokenizer.

Conventions
    * Sentences carry no leading space; join them (and the question and the answer prefix) with one space. Encoding the
      pieces ``first, " " + second, ...`` and concatenating then equals encoding the whole.
    * The answer prefix of a *number* ends in a space: the space before digits is a token of its own (as in Llama-3), so
      the prompt's last token is the one that has to retrieve the value. Words and UUIDs carry their space themselves.
"""

from __future__ import annotations

import random
import re
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from llm_accel.eval.rows import read_word_lists

Kind = Literal["word", "number", "uuid"]
Split = Literal["train", "test"]

KEY_KINDS: tuple[Kind, ...] = ("word", "number", "uuid")
HARD_SHARE = 0.06  # share of filler sentences with needle-like words, keys or digits


WORDS = {name: tuple(words.split()) for name, words in read_word_lists(Path(__file__).with_name("words.txt")).items()}
TRAIN_KEYS: tuple[str, ...] = WORDS["TRAIN_KEYS"]
TEST_KEYS: tuple[str, ...] = WORDS["TEST_KEYS"]
"""Held out: no needle had such a key while the bundled model was trained (they do occur in filler)."""

POOLS: dict[str, tuple[str, ...]] = {
    **{name: WORDS[name] for name in ("ADJ", "NOUN", "VERB", "ADV", "PREP")},
    "KEY": TRAIN_KEYS + TEST_KEYS,
}
TEMPLATES: tuple[str, ...] = (
    "The ADJ NOUN VERB the NOUN.",
    "A NOUN VERB the ADJ NOUN PREP the NOUN.",
    "The NOUN PREP the NOUN was ADJ.",
    "It was ADJ and the NOUN VERB it ADV.",
    "The NOUN VERB the NOUN because it was ADJ.",
    "While the NOUN VERB the NOUN, a ADJ NOUN VERB it.",
    "We go to the ADJ NOUN ADV.",
    "All day the NOUN VERB a NOUN.",
    "Then a ADJ NOUN VERB the NOUN and the NOUN.",
)
HARD_TEMPLATES: tuple[str, ...] = (
    "Many people in KEY VERB the NOUN.",
    "There are NUM ADJ people in KEY.",
    "The ADJ NOUN of KEY was VERB ADV.",
    "The number of the house in KEY is NUM.",
    "One of the special people in KEY VERB the magic NOUN.",
    "The KEY and the KEY are ADJ.",
)
_SLOT = re.compile("|".join(sorted([*POOLS, "NUM"], key=len, reverse=True)))


def _fill(template: str, rng: random.Random) -> str:
    def value(match: re.Match[str]) -> str:
        slot = match.group()
        return str(rng.randrange(1, 10 ** rng.randint(1, 4))) if slot == "NUM" else rng.choice(POOLS[slot])

    return _SLOT.sub(value, template)


def filler_sentences(rng: random.Random) -> Iterator[str]:
    """Endless grammatical sentences, each ending in "."; a share of :data:`HARD_SHARE` looks a little like a needle."""
    while True:
        yield _fill(rng.choice(HARD_TEMPLATES if rng.random() < HARD_SHARE else TEMPLATES), rng)


def make_value(rng: random.Random, kind: Kind = "number") -> str:
    """A value to hide: a 7-digit number (RULER's length; no leading zero), a plain word, or a UUID."""
    if kind == "number":
        return str(rng.randrange(10**6, 10**7))
    if kind == "word":
        return rng.choice(POOLS["NOUN"])
    if kind == "uuid":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    raise ValueError(f"unknown kind {kind!r}: expected one of {', '.join(KEY_KINDS)}")


def make_keys(rng: random.Random, n: int, kind: Kind = "word", split: Split = "test") -> list[str]:
    """``n`` distinct keys. Word keys come from the split's pool; number and UUID keys are random, the same for both.
    Raises :class:`ValueError`: unknown kind or split, or more word keys asked for than the pool holds."""
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}: expected 'train' or 'test'")
    if kind == "word":
        pool = TRAIN_KEYS if split == "train" else TEST_KEYS
        if n > len(pool):
            raise ValueError(f"{n} word keys asked for, the {split} pool holds {len(pool)}: use kind='number'")
        return rng.sample(pool, n)
    keys: dict[str, None] = {}
    while len(keys) < n:
        keys[make_value(rng, kind)] = None
    return list(keys)


def join_list(items: Sequence[str], last: str = " and ") -> str:
    """``a``; ``a and b``; ``a, b and c``; ``last`` joins the last one."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + last + items[-1]


def needle_text(key: str, value: str, kind: Kind = "number") -> str:
    """One needle sentence; ``kind`` is the value's. Several values of a key are several needles."""
    return f"One of the special magic {kind}s for {key} is: {value}."


def question_text(keys: Sequence[str], kind: Kind = "number", n_values: int = 1, last: str = " and ") -> str:
    """The question for all values of ``keys``; ``n_values``: values each key has (> 1 is multi-value)."""
    if len(keys) == 1 and n_values == 1:
        return f"What is the special magic {kind} for {keys[0]} mentioned in the provided text?"
    return f"What are all the special magic {kind}s for {join_list(keys, last)} mentioned in the provided text?"


def answer_prefix(keys: Sequence[str], kind: Kind = "number", n_values: int = 1) -> str:
    """What the answer begins with; generation continues it with the value. Ends in a space for numbers (see module)."""
    verb, plural = ("is", "") if len(keys) == 1 and n_values == 1 else ("are", "s")
    space = " " if kind == "number" else ""
    return f"The special magic {kind}{plural} for {join_list(keys)} {verb}:{space}"


_UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
_VALUE: dict[Kind, re.Pattern[str]] = {
    "number": re.compile(r"\d+"),
    "word": re.compile(r"\b(?!and\b)[A-Za-z]+"),
    "uuid": re.compile(_UUID, re.IGNORECASE),
}


def extract_values(answer: str, kind: Kind = "number", n: int = 1) -> list[str]:
    """The first ``n`` values in a generated continuation, in order (a number is a whole run of digits)."""
    return _VALUE[kind].findall(answer)[:n]


def exact_match(answer: str, values: Sequence[str], kind: Kind = "number") -> bool:
    """Whether the first ``len(values)`` values of ``answer`` are ``values``, in any order."""
    return sorted(extract_values(answer, kind, len(values))) == sorted(values)


def recall(answer: str, values: Sequence[str]) -> float:
    """RULER's score: the share of ``values`` that occur in ``answer``."""
    return sum(value.lower() in answer.lower() for value in values) / len(values)


def value_words() -> tuple[str, ...]:
    """The words that serve as values of kind "word" (common nouns of the filler)."""
    return POOLS["NOUN"]


def common_words() -> tuple[str, ...]:
    """Nouns, adjectives, verbs and adverbs of the filler: further keys to train on, none of them held out."""
    return tuple(word for pool in ("NOUN", "ADJ", "VERB", "ADV") for word in POOLS[pool])
