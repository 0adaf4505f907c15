"""Variable tracking: assignments that lead from one variable to the next, hidden in noise; all are asked for."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from itertools import pairwise, repeat

from llm_accel.eval.prompts import template
from llm_accel.eval.prompts.encoding import Encoder
from llm_accel.eval.prompts.template import NOISE, PromptTemplate, Segment

_HOPS = 4
_EXAMPLE_TOKENS = 500  # of the solved example in front, at most an eighth of the prompt
_INTRO = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"


@dataclass(frozen=True)
class ChainBuilder:
    """Prompts with one chain of four hops, after a solved example with shorter names."""

    encoder: Encoder

    def draw(self, rng: random.Random, sample: int, length: int) -> PromptTemplate:
        """A chain and its value."""
        names, value, lines = _chain(rng, letters=5)
        hidden: list[Segment] = list(self.encoder.lines([line + "\n" for line in lines]))
        (noise,) = self.encoder.lines([NOISE + "\n"])

        def fill(size: int) -> list[Segment]:
            filler = template.take_tokens(repeat(noise), size - template.count_tokens(hidden))
            return template.insert_segments(filler, template.random_positions(rng, filler, len(hidden)), hidden)

        return PromptTemplate(
            intro=_example(rng, min(_EXAMPLE_TOKENS, length // 8) // len(noise)) + _INTRO,
            fill=fill,
            question=_question(value),
            prefix=_prefix(value),
            answers=tuple(names),
        )


def _chain(rng: random.Random, letters: int) -> tuple[list[str], str, list[str]]:
    """Different names, the value, and the lines that assign it to the first and each to the next."""
    names: dict[str, None] = {}
    while len(names) <= _HOPS:
        names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    chain, value = list(names), str(rng.randrange(10**4, 10**5))
    lines = [f"VAR {chain[0]} = {value}", *(f"VAR {b} = VAR {a}" for a, b in pairwise(chain))]
    return chain, value, lines


def _example(rng: random.Random, noises: int) -> str:
    """A solved example with ``noises`` passages of noise, at least as many as it has lines."""
    names, value, lines = _chain(rng, letters=3)
    text = [NOISE] * max(noises, len(lines))
    for moved, (place, line) in enumerate(zip(sorted(rng.sample(range(len(text)), len(lines))), lines, strict=True)):
        text.insert(place + moved, line)
    solved = f"{_question(value)} {_prefix(value)} {' '.join(names)}"
    return _INTRO + "\n".join(text) + "\n" + solved + "\n\n"


def _question(value: str) -> str:
    return f"Question: Find all variables that are assigned the value {value} in the text above."


def _prefix(value: str) -> str:
    return (
        "Answer: According to the chain(s) of variable assignment in the text above, "
        f"{_HOPS + 1} variables are assigned the value {value}, they are:"
    )
