"""Reads the prompts of some rows, a chunk at each step, into a cache of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llm_accel.patches.applied import AppliedMethods
from llm_accel.patches.forward import Forward
from llm_accel.patches.running import Reading
from llm_accel.serve.chooser import Chooser
from llm_accel.serve.conversations import Conversations
from llm_accel.serve.group import Group
from llm_accel.serve.logprobs import prompt_logprobs
from llm_accel.serve.sequences import TokenSequence


class ReadingRows:
    """Rows whose prompts are being read.

    Attributes:
        rows: of one method; several only where their prompts can be read in one call.
        group: those that go on and their cache, once all of them have their first token; None before that.
    """

    def __init__(
        self,
        forward: Forward,
        methods: AppliedMethods,
        conversations: Conversations,
        chooser: Chooser,
        rows: Sequence[TokenSequence],
        chunk: int,
    ) -> None:
        self.rows = list(rows)
        self.group: Group | None = None
        self._forward, self._methods, self._conversations, self._chooser = forward, methods, conversations, chooser
        self._chunk = self._most = chunk
        self._parts = self._read()

    def step(self, most: int) -> bool:
        """Reads the next chunk, or ``most`` tokens where that is the same; whether there is more to read."""
        self._most = most
        return next(self._parts, False)

    @property
    def over(self) -> bool:
        """Whether nobody waits for any of them."""
        return all(row.over for row in self.rows)

    def _read(self) -> Iterator[bool]:
        yield from self._read_logprobs()
        rows = [row for row in self.rows if not row.over]
        if rows:
            yield from self._read_prompts(rows)

    def _read_logprobs(self) -> Iterator[bool]:
        """Those of the prompts, by the dense model; rows that want nothing else are over then."""
        for row in self.rows:
            top = row.job.prompt_logprobs
            if top is not None:
                self._methods.use(())
                for part in prompt_logprobs(self._forward.model, row.prompt, top):
                    row.prompt_logprobs += part
                    yield True
                    self._methods.use(())
            if row.job.max_new_tokens == 0:
                row.end_unsaid()

    def _read_prompts(self, rows: list[TokenSequence]) -> Iterator[bool]:
        job, methods = rows[0].job, rows[0].job.methods or self._methods.plain
        self._methods.use(methods)
        cache = self._conversations.reopen(job) if job.session is not None else None
        if cache is None:
            cache = self._methods.new_cache()
        prompts = list(dict.fromkeys(row.prompt for row in rows))  # several answers to one prompt read it once
        joins = self._methods.joins
        reading = Reading(self._forward, prompts, cache, job.features, joins)
        while (done := reading.step(self._chunk, self._most)) is None:
            yield True
            self._methods.use(methods)
        running, logits = done
        self.group = Group(methods, running, joins and not job.features)
        self.group.begin(rows, [prompts.index(row.prompt) for row in rows], logits, self._chooser)
