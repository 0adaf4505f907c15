"""Reads the prompts of some rows, a chunk at each step, into a cache of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from llm_accel.api import Handle
from llm_accel.cache.stock import has_linear_state
from llm_accel.patches.cache_name import CACHE
from llm_accel.patches.hook import session_of
from llm_accel.patches.rows import keeps_turns
from llm_accel.serve.chooser import Chooser
from llm_accel.serve.conversations import Conversations
from llm_accel.serve.forward import Forward, Given
from llm_accel.serve.group import Group
from llm_accel.serve.logprobs import prompt_logprobs
from llm_accel.serve.methods import AppliedMethods
from llm_accel.serve.sequences import TokenSequence


class Prefill:
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
        self._chunk = chunk
        self._parts = self._read()

    def step(self) -> bool:
        """Reads the next chunk; whether there is more to read."""
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
        methods = rows[0].job.methods or self._methods.plain
        handle = self._methods.use(methods)
        begin, given, ids = self._given(rows, handle)
        joins, width = handle is not None and handle.can_prefill, ids.shape[1]
        # a model that keeps a state beside entries goes on from it one token at a time
        parts = joins and not rows[0].job.features and not any(map(has_linear_state, given[CACHE].layers))
        while True:
            end = min(width, begin + self._chunk) if parts else width
            output = self._forward.read(ids, given, begin, end)
            if end == width:
                break
            begin = end
            yield True
            self._methods.use(methods)
        given = self._forward.next_given(output, given)
        places = _places(rows)
        job, session = rows[0].job, session_of(given[CACHE])
        kept = job.session is None or session is None or keeps_turns(session.plan)
        group = Group(self._forward, methods, rows, given, alone=job.alone or not (joins and kept))
        group.choose(output.logits[places, -1].float(), self._chooser)
        self.group = group
        group.rows = [row for row in rows if not row.over]
        if group.rows:
            group.keep([place for place, row in zip(places, rows, strict=True) if not row.over])

    def _given(self, rows: Sequence[TokenSequence], handle: Handle | None) -> tuple[int, Given, Tensor]:
        """Tokens that the cache has seen, what goes with the prompts, and their ids, padded on the left."""
        job, model = rows[0].job, self._forward.model
        cache = self._conversations.reopen(job) if job.session is not None else None
        if cache is None:
            cache = DynamicCache(config=model.config) if handle is None else handle.new_cache()
        prompts = _prompts(rows)
        width = max(map(len, prompts))
        padding = [width - len(prompt) for prompt in prompts]
        padded = [(self._forward.pad,) * count + prompt for count, prompt in zip(padding, prompts, strict=True)]
        ids = torch.tensor(padded, device=model.device)
        mask = (torch.arange(width, device=ids.device) >= ids.new_tensor(padding)[:, None]).long()
        features = {
            name: one.to(model.device, model.dtype if one.is_floating_point() else one.dtype)
            for name, one in job.features.items()
        }
        session = session_of(cache)
        if session is not None:
            session.announce(width, None)
        return cache.get_seq_length(), self._forward.begin(ids, mask, cache, features), ids


def _prompts(rows: Sequence[TokenSequence]) -> list[tuple[int, ...]]:
    """Each of their prompts once: several answers to one need it read once."""
    return list(dict.fromkeys(row.prompt for row in rows))


def _places(rows: Sequence[TokenSequence]) -> list[int]:
    """The prompt of each row among :func:`_prompts`."""
    known = {prompt: place for place, prompt in enumerate(_prompts(rows))}
    return [known[row.prompt] for row in rows]
