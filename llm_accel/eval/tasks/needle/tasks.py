"""The needles and the question of one prompt, in RULER's terms (Hsieh et al. 2024, arXiv 2404.06654).

========== ========================== ======================================
task       needles                    asked
========== ========================== ======================================
single     1                          its value
multikey   N keys, one value each     the value of one key, the others distract
multivalue 1 key, N values            all values of the key
multiquery N keys, one value each     the values of all keys
========== ========================== ======================================

``distractors`` adds needles with further keys that nobody asks for to any of them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from llm_accel.errors import ConfigError
from llm_accel.eval.prompts import grammar
from llm_accel.eval.tasks.needle.settings import Settings


@dataclass(frozen=True)
class Puzzle:
    """Texts of one prompt.

    Attributes:
        asked: needle sentences that hold the answer.
        others: needle sentences that do not.
        question: what is asked, one sentence.
        prefix: how the answer begins; may end in a space.
        values: the expected values, in the order of ``asked``.
    """

    asked: tuple[str, ...]
    others: tuple[str, ...]
    question: str
    prefix: str
    values: tuple[str, ...]


def make_puzzle(settings: Settings, rng: random.Random) -> Puzzle:
    """Draws keys and values, all different from each other, and writes needles, question and answer prefix."""
    n, kind = settings.needles, settings.value_kind
    n_keys = (1 if settings.task == "multivalue" else n) + settings.distractors
    keys = grammar.make_keys(rng, n_keys, settings.key_kind)
    values = _distinct_values(rng, n + settings.distractors, kind, taken=set(keys))
    per_key = n if settings.task == "multivalue" else 1
    owners = [keys[0]] * per_key + keys[1:]
    sentences = [grammar.needle_text(key, value, kind) for key, value in zip(owners, values, strict=True)]
    n_asked = n if settings.task in ("multivalue", "multiquery") else 1
    asked_keys = keys[:1] if settings.task == "multivalue" else keys[:n_asked]
    return Puzzle(
        asked=tuple(sentences[:n_asked]),
        others=tuple(sentences[n_asked:]),
        question=grammar.question_text(asked_keys, kind, per_key),
        prefix=grammar.answer_prefix(asked_keys, kind, per_key),
        values=tuple(values[:n_asked]),
    )


def check_task(settings: Settings) -> None:
    """Raises :class:`ConfigError` where the pools of words are smaller than what is asked for."""
    n_keys = (1 if settings.task == "multivalue" else settings.needles) + settings.distractors
    n_values = settings.needles + settings.distractors
    if settings.key_kind == "word" and n_keys > len(grammar.TEST_KEYS):
        raise ConfigError(f"{n_keys} word keys asked for, there are {len(grammar.TEST_KEYS)}: use --key-kind number.")
    pool = len(grammar.value_words())
    if settings.value_kind == "word" and n_values > pool:
        raise ConfigError(f"{n_values} word values asked for, there are {pool}: use --value-kind number.")


def _distinct_values(rng: random.Random, n: int, kind: grammar.Kind, taken: set[str]) -> list[str]:
    values: list[str] = []
    while len(values) < n:
        value = grammar.make_value(rng, kind)
        if value not in taken:
            taken.add(value)
            values.append(value)
    return values
