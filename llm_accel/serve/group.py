"""Rows that share a cache and its decode steps. They come with a cache of their own, and leave when they are over."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from llm_accel.patches.applied import Methods
from llm_accel.patches.running import RunningRows, bytes_of
from llm_accel.serve.logprobs import token_logprobs
from llm_accel.serve.sampling import choose
from llm_accel.serve.sequences import TokenSequence


class Group:
    """Answers in the making.

    Attributes:
        methods: what is on the model in its steps.
        rows: those that generate, in the order of the cache.
        running: their cache.
        nbytes: bytes of it when a row last came or left.
    """

    def __init__(self, methods: Methods, running: RunningRows, joins: bool) -> None:
        self.methods, self.running, self.nbytes = methods, running, 0
        self.rows: list[TokenSequence] = []
        self._joins = joins

    def begin(self, rows: Sequence[TokenSequence], places: Sequence[int], logits: Tensor) -> None:
        """Gives each of ``rows`` its first token and keeps those that go on; ``places``: their prompts in the cache."""
        self.rows = list(rows)
        self._choose(logits[list(places)])
        self.rows = [row for row in rows if not row.over]
        self._keep([place for place, row in zip(places, rows, strict=True) if not row.over])

    def kind(self) -> Hashable:
        """Groups of one kind can be joined; those of others have rows that no other group can take."""
        found = self.running.kind(self.rows[0].job.session is not None) if self._joins else None
        return id(self) if found is None else (self.methods, found)

    def step(self) -> None:
        """One token for every row."""
        self._choose(self.running.step([row.tokens[-1] for row in self.rows]))

    def join(self, other: Group) -> None:
        """Takes in the rows of another group of the same kind."""
        first = self.running.width
        self.running.join(other.running)
        places = [*range(len(self.rows)), *range(first, first + len(other.rows))]
        self.rows = [*self.rows, *other.rows]
        self._keep(places)

    def leave(self) -> None:
        """Lets go of rows that are over."""
        places = [place for place, row in enumerate(self.rows) if not row.over]
        if len(places) < len(self.rows):
            self.rows = [self.rows[place] for place in places]
            self._keep(places)

    def _keep(self, places: Sequence[int]) -> None:
        if not places:
            self.nbytes = 0
            return
        self.running.announce(max(row.job.max_new_tokens - len(row.tokens) for row in self.rows))
        self.running.keep(places)
        self.nbytes = bytes_of(self.running.cache)

    @torch.no_grad()
    def _choose(self, logits: Tensor) -> None:
        """Gives each row its next token, by its logits, fp32 [B, V]: first the model's own rules, then those of a
        method that changes logits, then what the request wants."""
        for number, row in enumerate(self.rows):
            if row.rules:
                ids = torch.tensor([[*row.prompt, *row.tokens]], device=logits.device)
                logits[number] = row.rules(ids, logits[number, None])[0]  # type: ignore[arg-type]
        contrast, settings = self.running.contrast, [row.job.sampling for row in self.rows]
        scores = adjusted = logits if contrast is None else contrast(None, logits)
        if any(setting.adjusts for setting in settings):
            adjusted = torch.stack([row.adjusted(own) for row, own in zip(self.rows, scores, strict=True)])
        tokens = choose(adjusted, settings, [row.draw() for row in self.rows])
        for number, (row, token) in enumerate(zip(self.rows, tokens.tolist(), strict=True)):
            top, logprob = row.job.sampling.logprobs, None
            if top is not None and not row.over:
                [logprob] = token_logprobs(scores[number, None], tokens[number, None], top)
            row.accept(token, logprob)
