"""Assembly of prompts in token ids, so that each has exactly the length asked for.

    prefix | lead-in, sentences and needles | question | suffix | answer prefix
    <------- context_length ---------------> <----- question_length ---------->

The lead-in is the end of a sentence, cut so that the total is exact. A needle stands at a sentence boundary: depth 0 is
the first one, right after the lead-in, depth 100 the last one, right before the question.
"""

from __future__ import annotations

import bisect
import hashlib
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from llm_accel.errors import ConfigError
from llm_accel.eval.prompts.encoding import Encoder, Frame
from llm_accel.eval.prompts.haystack import Haystack
from llm_accel.eval.tasks.needle.settings import Settings
from llm_accel.eval.tasks.needle.tasks import Puzzle, make_puzzle

_MARGIN, _MARGIN_WITHOUT_PREFIX = 4, 64  # new tokens beyond the answer's own


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        ids: the whole prompt, ``length`` tokens.
        context_length: tokens before the question; the part that query-agnostic compression sees.
        values: expected values.
        needles: first token of each asked needle in ``ids``, in the order of ``values``.
        others: first token of each other needle.
        length, depth, sample: its place in the grid.
    """

    ids: tuple[int, ...]
    context_length: int
    values: tuple[str, ...]
    needles: tuple[int, ...]
    others: tuple[int, ...]
    length: int
    depth: float
    sample: int

    def digest(self) -> str:
        """Hash of the ids, 16 hex digits."""
        return hashlib.sha256(",".join(map(str, self.ids)).encode()).hexdigest()[:16]


@dataclass
class PromptMaker:
    """Makes the prompts of a run; the same settings and seed give the same ids in any order, shard or process."""

    settings: Settings
    encoder: Encoder
    frame: Frame
    haystack: Haystack

    def make(self, length: int, depth: float, sample: int) -> Prompt:
        """The prompt of one place in the grid, ``length`` tokens.

        Raises:
            ConfigError: the length has no room for question, needles and template.
        """
        rng = random.Random(f"needle/{self.settings.seed}/{length}/{depth}/{sample}")
        puzzle = make_puzzle(self.settings, rng)
        tail, asked, others = self._encode(puzzle)
        head = list(self.frame.prefix)
        room = length - len(head) - len(tail) - sum(map(len, asked)) - sum(map(len, others))
        if room < 0:
            raise ConfigError(
                f"--lengths {length}: template, question and needles alone take {length - room} tokens; "
                f"give at least {length - room}, or fewer needles."
            )
        lead_in, sentences = self._fill(room, rng)
        ends = [len(lead_in)]  # filler tokens before each boundary
        for sentence in sentences:
            ends.append(ends[-1] + len(sentence))
        asked_at = [_boundary(ends, target) for target in _targets(depth, len(asked), room)]
        others_at = _elsewhere(len(ends), set(asked_at), len(others), rng)
        here: dict[int, list[tuple[bool, int]]] = defaultdict(list)  # boundary -> (asked?, index)
        for is_asked in (True, False) if depth < 100 else (False, True):  # at depth 100 the asked one is last
            for i, slot in enumerate(asked_at if is_asked else others_at):
                here[slot].append((is_asked, i))
        ids = head + list(lead_in)
        starts: dict[tuple[bool, int], int] = {}
        for slot in range(len(ends)):
            for is_asked, i in here[slot]:
                starts[is_asked, i] = len(ids)
                ids += asked[i] if is_asked else others[i]
            ids += sentences[slot] if slot < len(sentences) else ()
        context_length = len(ids)
        ids += tail
        if len(ids) != length:
            raise RuntimeError(f"assembled {len(ids)} tokens instead of {length}")
        return Prompt(
            ids=tuple(ids),
            context_length=context_length,
            values=puzzle.values,
            length=length,
            depth=depth,
            sample=sample,
            needles=tuple(starts[True, i] for i in range(len(asked))),
            others=tuple(starts[False, i] for i in range(len(others))),
        )

    @property
    def max_new_tokens(self) -> int:
        """Tokens to generate at most: what the settings say, or what a drawn answer takes and some more."""
        if self.settings.max_new_tokens is not None:
            return self.settings.max_new_tokens
        puzzle = make_puzzle(self.settings, random.Random("answer"))
        margin = _MARGIN if self.settings.answer_prefix else _MARGIN_WITHOUT_PREFIX
        return len(self.encoder.continuation(", ".join(puzzle.values) + " and.")) + margin

    def _encode(self, puzzle: Puzzle) -> tuple[list[int], list[list[int]], list[list[int]]]:
        """Ids of question, suffix and answer prefix together, of the asked needles, of the others."""
        question, *needles = self.encoder.continuations([puzzle.question, *puzzle.asked, *puzzle.others])
        tail = [*question, *self.frame.suffix]
        if self.settings.answer_prefix:
            tail += self.encoder.answer_prefix(puzzle.prefix, begins=self.frame.chat)
        return tail, needles[: len(puzzle.asked)], needles[len(puzzle.asked) :]

    def _fill(self, room: int, rng: random.Random) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
        """A lead-in and whole sentences, ``room`` tokens together."""
        sentences: list[tuple[int, ...]] = []
        total = 0
        stream = self.haystack.draw(rng)
        while total < room:
            sentences.append(next(stream))
            total += len(sentences[-1])
        excess = total - room
        while excess and excess >= len(sentences[0]):
            excess -= len(sentences.pop(0))
        return (sentences[0][excess:], sentences[1:]) if excess else ((), sentences)


def _targets(depth: float, count: int, room: int) -> list[float]:
    """Filler tokens before each asked needle: the first at ``depth``, further ones spread over what is left."""
    return [room * (depth + i * (100 - depth) / count) / 100 for i in range(count)]


def _boundary(ends: Sequence[int], target: float) -> int:
    """Index of the boundary nearest to ``target`` filler tokens."""
    right = min(bisect.bisect_left(ends, target), len(ends) - 1)
    left = max(right - 1, 0)
    return left if target - ends[left] <= ends[right] - target else right


def _elsewhere(boundaries: int, taken: set[int], count: int, rng: random.Random) -> list[int]:
    """Boundaries for the other needles: random, different, none of the asked needles' where there are enough."""
    free = [slot for slot in range(boundaries) if slot not in taken]
    if len(free) >= count:
        return rng.sample(free, count)
    return [rng.randrange(boundaries) for _ in range(count)]
