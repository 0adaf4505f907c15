"""Rows that share a cache and its decode steps. They come with a cache of their own, and leave when they are over."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from torch import Tensor

from llm_accel.patches.applied import Methods
from llm_accel.patches.running import RunningRows, bytes_of
from llm_accel.serve.chooser import Chooser
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

    def begin(self, rows: Sequence[TokenSequence], places: Sequence[int], logits: Tensor, chooser: Chooser) -> None:
        """Gives each of ``rows`` its first token and keeps those that go on; ``places``: their prompts in the cache."""
        chooser.choose(rows, logits[list(places)], self.running.contrast)
        self.rows = [row for row in rows if not row.over]
        self._keep([place for place, row in zip(places, rows, strict=True) if not row.over])

    def kind(self) -> Hashable:
        """Groups of one kind can be joined; those of others have rows that no other group can take."""
        found = self.running.kind(self.rows[0].job.session is not None) if self._joins else None
        return id(self) if found is None else (self.methods, found)

    def step(self, chooser: Chooser) -> None:
        """One token for every row."""
        logits = self.running.step([row.tokens[-1] for row in self.rows])
        chooser.choose(self.rows, logits, self.running.contrast)

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
