"""Prompts of exactly the length asked for, assembled in token ids.

prefix | intro | context | question | suffix | answer prefix
<--- context_length ---->
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from functools import cached_property

from llm_accel.common.arguments import flag
from llm_accel.errors import ConfigError
from llm_accel.eval.prompts.encoding import Encoder, Frame
from llm_accel.eval.prompts.haystack import Haystack
from llm_accel.eval.prompts.puzzle import Builder, NoRoom
from llm_accel.eval.tasks.ruler.chains import ChainBuilder
from llm_accel.eval.tasks.ruler.documents import load_questions
from llm_accel.eval.tasks.ruler.lists import CodedBuilder, ListBuilder
from llm_accel.eval.tasks.ruler.needles import NeedleBuilder
from llm_accel.eval.tasks.ruler.settings import Settings
from llm_accel.eval.tasks.ruler.tasks import TASKS, Task
from llm_accel.eval.tasks.ruler.words import read_words


@dataclass(frozen=True, order=True)
class Place:
    """One prompt of a run; ordered so that cheap prompts come first and those of one length lie together."""

    length: int
    task: str
    sample: int


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        ids: the whole prompt; with the tokens that the task may generate ``length`` tokens.
        context_length: tokens before the question; the part that query-agnostic compression sees.
        answer_start: tokens before the answer prefix.
        expected: strings that the answer should hold, or one of them.
    """

    ids: tuple[int, ...]
    context_length: int
    answer_start: int
    expected: tuple[str, ...]
    place: Place

    def digest(self) -> str:
        """Hash of the ids, 16 hex digits."""
        return hashlib.sha256(",".join(map(str, self.ids)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class PromptMaker:
    """Makes the prompts of a run; the same settings and seed give the same ids in any order, shard or process."""

    settings: Settings
    encoder: Encoder
    frame: Frame
    prose: Haystack

    def make(self, place: Place) -> Prompt:
        """The prompt of a place.

        Raises:
            ConfigError: the length has no room for what the task must show.
        """
        task = TASKS[place.task]
        rng = random.Random(f"ruler/{self.settings.seed}/{place.task}/{place.length}/{place.sample}")
        puzzle = self.builders[place.task].draw(rng, place.sample, place.length)
        head = [*self.frame.prefix, *self.encoder.start(puzzle.intro)]
        (question,) = (self.encoder.lines if puzzle.on_line else self.encoder.continuations)([puzzle.question])
        tail = [*question, *self.frame.suffix]
        prefix = self.encoder.answer_prefix(puzzle.prefix, begins=self.frame.chat)
        room = place.length - task.new_tokens - len(head) - len(tail) - len(prefix)
        try:
            context = [token for piece in puzzle.fill(room) for token in piece]
        except NoRoom as error:
            raise ConfigError(
                f"--lengths {place.length}: {task.name} needs more; give at least {place.length + error.missing}."
            ) from error
        ids = [*head, *context, *tail, *prefix]
        if len(ids) != place.length - task.new_tokens:
            raise RuntimeError(f"assembled {len(ids)} tokens instead of {place.length - task.new_tokens}")
        return Prompt(tuple(ids), len(head) + len(context), len(ids) - len(prefix), puzzle.answers, place)

    @cached_property
    def builders(self) -> dict[str, Builder]:
        """What draws the puzzles of each task.

        Raises:
            ConfigError: the questions of a task, or the words for lists, cannot be read.
        """
        return {name: self._builder(TASKS[name]) for name in self.settings.tasks}

    def _builder(self, task: Task) -> Builder:
        if task.family == "niah":
            return NeedleBuilder(task, self.settings.wording, self.encoder, self.prose)
        if task.family == "vt":
            return ChainBuilder(self.encoder)
        if task.family == "cwe":
            return ListBuilder(self.encoder, read_words(self.settings.words) if self.settings.words else ())
        if task.family == "fwe":
            return CodedBuilder(self.encoder)
        return load_questions(getattr(self.settings, task.name), flag(task.name), self.encoder)
