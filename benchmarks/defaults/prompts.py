"""Prompts to choose defaults on, and others to confirm them on: values of several kinds, wordings and haystacks.

``FAMILIES["choose"]`` and ``FAMILIES["confirm"]`` share neither wording nor seed. Haystacks are the built-in sentences
and English prose that every Python carries (``pydoc_data.topics``).
"""

from __future__ import annotations

import random
import re
import string
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pydoc_data.topics import topics  # type: ignore[import-untyped]
from typing import Literal

from llm_accel.eval.prompts import grammar
from llm_accel.eval.prompts.encoding import Encoder, Frame

Half = Literal["choose", "confirm"]
_SENTENCE = re.compile(r"(?<=[.!?])\s+")


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10**6, 10**7))


def _code(rng: random.Random) -> str:
    return "".join(rng.choice(string.ascii_uppercase + string.digits) for _ in range(8))


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _word(rng: random.Random) -> str:
    return rng.choice(grammar.value_words())


def _sentence(rng: random.Random) -> str:
    return next(grammar.filler_sentences(rng)).rstrip(".")


@dataclass(frozen=True)
class Family:
    """Prompts of one kind.

    Attributes:
        value: draws a value.
        hidden: what hides it, of {key} and {value}.
        question: what asks for it, of {key}.
        prefix: how the answer begins, or nothing.
        hay: "grammar" or "prose".
        others: values of other keys that nobody asks for.
    """

    name: str
    value: Callable[[random.Random], str]
    hidden: str
    question: str
    prefix: str
    hay: Literal["grammar", "prose"]
    others: int = 0


_MAGIC = "One of the special magic {kind}s for {{key}} is: {{value}}."
_ASK = "What is the special magic {kind} for {{key}} mentioned in the provided text?"
_BEGIN = "The special magic {kind} for {{key}} is:"


def _magic(name: str, kind: str, value: Callable[[random.Random], str], others: int = 0) -> Family:
    texts = (text.format(kind=kind) for text in (_MAGIC, _ASK, _BEGIN))
    return Family(name, value, *texts, hay="grammar", others=others)


FAMILIES: dict[Half, tuple[Family, ...]] = {
    "choose": (
        _magic("number", "number", _number),
        _magic("number of four", "number", _number, others=3),
        Family(
            "code, no prefix",
            _code,
            "The access code of the {key} gate is {value}.",
            "What is the access code of the {key} gate? Reply with the code.",
            "",
            "prose",
        ),
        Family(
            "sentence",
            _sentence,
            "The motto of the {key} club reads: {value}.",
            "What does the motto of the {key} club read?",
            "The motto of the {key} club reads:",
            "prose",
        ),
        Family(
            "uuid",
            _uuid,
            "The {key} record has the id {value}.",
            "Which id has the {key} record?",
            "The {key} record has the id",
            "grammar",
        ),
    ),
    "confirm": (
        Family(
            "number, no prefix",
            _number,
            "Note that the phone number of {key} is {value}.",
            "What is the phone number of {key}?",
            "",
            "prose",
        ),
        Family(
            "code of four",
            _code,
            "Locker {key} opens with {value}.",
            "With what does locker {key} open?",
            "Locker {key} opens with",
            "grammar",
            others=3,
        ),
        Family(
            "uuid",
            _uuid,
            "Session {key} was stored as {value}.",
            "As what was session {key} stored?",
            "Session {key} was stored as",
            "prose",
        ),
        _magic("word of four", "word", _word, others=3),
        Family(
            "sentence, no prefix",
            _sentence,
            'On the {key} stone somebody wrote: "{value}."',
            "What did somebody write on the {key} stone? Repeat it word for word.",
            "",
            "grammar",
        ),
    ),
}


@dataclass(frozen=True)
class Case:
    """One prompt and what its answer must hold."""

    ids: tuple[int, ...]
    value: str


@lru_cache(maxsize=1)
def _prose() -> tuple[str, ...]:
    text = " ".join(topics[name] for name in sorted(topics))
    text = re.sub(r"[*`_]|\.\. .*?\n|\S*://\S*", "", text)
    sentences = (" ".join(part.split()) for part in _SENTENCE.split(text))
    return tuple(s for s in sentences if 30 < len(s) < 250 and s[0].isupper() and s.endswith("."))


def _hay(kind: str, rng: random.Random, encoder: Encoder, room: int) -> list[list[int]]:
    """Sentences of ``room`` tokens at most."""
    sentences: list[list[int]] = []
    stream = grammar.filler_sentences(rng)
    prose, at = _prose(), rng.randrange(len(_prose()))
    left = room
    while True:
        texts = [next(stream) if kind == "grammar" else prose[(at + i) % len(prose)] for i in range(32)]
        at += 32
        for ids in encoder.continuations(texts):
            if len(ids) > left:
                return sentences
            left -= len(ids)
            sentences.append(ids)


def make_case(half: Half, family: Family, length: int, sample: int, encoder: Encoder, frame: Frame) -> Case:
    """The prompt of about ``length`` tokens, a sentence fewer at most."""
    rng = random.Random(f"defaults/{half}/{family.name}/{length}/{sample}")
    keys = rng.sample(grammar.TRAIN_KEYS, 1 + family.others)
    values: list[str] = []
    while len(values) < len(keys):
        value = family.value(rng)
        if value not in values:
            values.append(value)
    needles = encoder.continuations([family.hidden.format(key=k, value=v) for k, v in zip(keys, values, strict=True)])
    question = encoder.continuation(family.question.format(key=keys[0]))
    begins = family.prefix.format(key=keys[0]) + " " * (family.value is _number)  # as `grammar` has it
    prefix = encoder.answer_prefix(begins, frame.chat) if begins.strip() else []
    tail = [*question, *frame.suffix, *prefix]
    room = length - len(frame.prefix) - len(tail) - sum(map(len, needles))
    sentences = _hay(family.hay, rng, encoder, room)
    for needle in needles:
        sentences.insert(rng.randrange(len(sentences) + 1), needle)
    return Case((*frame.prefix, *(i for s in sentences for i in s), *tail), values[0])
