"""Prompts of exactly the length asked for, assembled in token ids.

    prefix | intro | context | question | suffix | answer prefix
    <--- context_length --->
    <--------------- answer_start ------------->

Prefix and suffix are the chat template's. A context is made of segments that are encoded once; where it is longer than
needed, its first segment loses its head.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from llm_accel.errors import ConfigError
from llm_accel.eval.grid import GridPoint
from llm_accel.eval.prompts.encoding import Encoder, Frame, make_frame
from llm_accel.eval.prompts.haystack import Haystack, load_haystack
from llm_accel.eval.prompts.template import PromptTemplate, TooShortError

_HAYSTACK_TOKENS = 2**18  # what is read of a long haystack at least; prompts begin anywhere in it


@dataclass(frozen=True)
class TextPrompt:
    """One prompt."""

    point: GridPoint  # its point of the grid
    ids: tuple[int, ...]  # the whole prompt
    context_length: int  # tokens before the question; the part that query-agnostic compression sees
    answer_start: int  # tokens before the answer prefix
    new_tokens: int  # tokens to generate at most
    expected: tuple[str, ...]  # strings that the answer should contain
    needles: tuple[int, ...] = ()  # first token of each asked needle in ``ids``, in the order of ``expected``
    others: tuple[int, ...] = ()  # first token of each other needle

    @property
    def key(self) -> tuple[Any, ...]:
        """The values that identify its records."""
        return self.point.key

    def digest(self) -> str:
        """Hash of the ids, 16 hex digits."""
        return hashlib.sha256(",".join(map(str, self.ids)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class PromptMaker(ABC):
    """Makes the prompts of a run; the same settings and seed give the same ids in any order, shard or process."""

    encoder: Encoder
    frame: Frame
    haystack: Haystack
    settings: Any

    @classmethod
    def load(cls, settings: Any, tokenizer: Any) -> Self:
        """The maker for a tokenizer; its ``settings`` are those given, with what the tokenizer decides filled in.

        Raises:
            ConfigError: a length too short for its prompts, an unreadable file, no chat template though asked for.
        """
        encoder = Encoder(tokenizer)
        frame = make_frame(encoder, settings.chat_template)
        haystack = load_haystack(settings.haystack, encoder, tokens=max(_HAYSTACK_TOKENS, 4 * max(settings.lengths)))
        maker = cls(encoder, frame, haystack, replace(settings, chat_template=frame.chat))
        for row in settings.rows:  # if any length is too short, it is the shortest one
            for sample in range(maker.tried_samples(row)):
                maker.make(GridPoint(min(settings.lengths), row, sample))
        return maker

    def tried_samples(self, row: Any) -> int:
        """Samples of a row of the grid that may need different lengths."""
        return int(self.settings.samples)

    @abstractmethod
    def template(self, point: GridPoint) -> PromptTemplate:
        """The parts of the prompt of a point."""

    @abstractmethod
    def new_tokens(self, point: GridPoint) -> int:
        """Tokens to generate at most."""

    def length(self, point: GridPoint) -> int:
        """Tokens of the prompt of a point."""
        return point.length

    def label(self, point: GridPoint) -> str:
        """The prompt's name in errors."""
        return str(point.row)

    def make(self, point: GridPoint) -> TextPrompt:
        """The prompt of a point. Raises :class:`ConfigError`: the length is too short for what the prompt must
        contain."""
        template = self.template(point)
        head = [*self.frame.prefix, *self.encoder.start(template.intro)]
        (question,) = (self.encoder.lines if template.on_line else self.encoder.continuations)([template.question])
        tail, prefix = [*question, *self.frame.suffix], []
        if template.prefix is not None:
            prefix = self.encoder.answer_prefix(template.prefix, begins=self.frame.chat)
        wanted = self.length(point)
        try:
            context = template.fill(wanted - len(head) - len(tail) - len(prefix))
        except TooShortError as error:
            raise ConfigError(
                f"--lengths {point.length}: {self.label(point)} needs more; give at least "
                f"{point.length + error.missing}."
            ) from error
        ids, starts = list(head), {}
        for segment in context:
            starts[id(segment)] = len(ids)
            ids += segment
        context_length = len(ids)
        ids += tail
        answer_start = len(ids)
        ids += prefix
        if len(ids) != wanted:
            raise RuntimeError(f"assembled {len(ids)} tokens instead of {wanted}")
        return TextPrompt(
            point=point,
            ids=tuple(ids),
            context_length=context_length,
            answer_start=answer_start,
            new_tokens=self.new_tokens(point),
            expected=template.answers,
            needles=tuple(starts[id(segment)] for segment in template.asked),
            others=tuple(starts[id(segment)] for segment in template.others),
        )

    def digest(self, lengths: Iterable[int], rows: Sequence[Any]) -> str:
        """Hash over the first prompt of every cell, 16 hex digits."""
        digest = hashlib.sha256()
        for length in lengths:
            for row in rows:
                digest.update(self.make(GridPoint(length, row, 0)).digest().encode())
        return digest.hexdigest()[:16]
