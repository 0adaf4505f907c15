"""Rows that share a cache and its decode steps. They come with a cache of their own, and leave when they are over."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from llm_accel.cache.fixed import round_up
from llm_accel.cache.linear import state_bytes
from llm_accel.common.generation import cache_bytes
from llm_accel.patches.cache_name import CACHE
from llm_accel.patches.hook import session_of
from llm_accel.patches.reply import ContrastProcessor
from llm_accel.patches.rows import join_running, keep_rows, kind_of
from llm_accel.report import LayerReport
from llm_accel.serve.chooser import Chooser
from llm_accel.serve.forward import Forward, Given
from llm_accel.serve.methods import Methods
from llm_accel.serve.sequences import TokenSequence


class Group:
    """Rows between two tokens.

    Attributes:
        methods: what is on the model in its steps.
        alone: whether no other rows may join: what the cache holds of one row cannot be joined with that of another.
        rows: those that generate.
        nbytes: bytes of keys, values and states when a row last came or left.
    """

    def __init__(
        self, forward: Forward, methods: Methods, rows: Sequence[TokenSequence], given: Given, alone: bool
    ) -> None:
        self.methods, self.alone, self.rows, self.nbytes = methods, alone, list(rows), 0
        self._forward, self._given = forward, given
        self._session = session_of(self.cache)
        self._settle()

    @property
    def cache(self) -> Any:
        """Keys and values of all rows."""
        return self._given[CACHE]

    @property
    def kind(self) -> Hashable:
        """Groups of one kind can be joined."""
        turns = self.rows[0].job.session is not None
        return id(self) if self.alone else (self.methods, turns, kind_of(self.cache, turns))

    def choose(self, logits: Tensor, chooser: Chooser) -> None:
        """Gives each row its next token; logits [B, V]."""
        plan = None if self._session is None else self._session.plan
        if plan is not None and plan.reply is not None and plan.reply.contrasts:
            contrast = ContrastProcessor(self._session, plan.reply, self._forward.model.get_output_embeddings())  # type: ignore[arg-type]
            chooser.choose(self.rows, logits, contrast)
        else:
            chooser.choose(self.rows, logits)

    def step(self, chooser: Chooser) -> None:
        """One token for every row."""
        tokens = [row.tokens[-1] for row in self.rows]
        tokens += [tokens[-1]] * (self.width - len(tokens))
        ids = torch.tensor(tokens, device=self._forward.model.device)[:, None]
        output = self._forward.step(ids, self._given)
        self._given = self._forward.next_given(output, self._given)
        self.choose(output.logits[: len(self.rows), -1].float(), chooser)

    def join(self, other: Group) -> None:
        """Takes in the rows of another group of the same kind, which is empty then."""
        length = max(self._length, other._length)
        own, more = self._given, other._given
        mask, first = own["attention_mask"], self.width
        slots = torch.arange(length + 1, device=mask.device)
        begins = [length + 1 - int(row.sum()) for row in (*mask, *more["attention_mask"])]
        own["attention_mask"] = (slots >= slots.new_tensor(begins)[:, None]).to(mask.dtype)
        if "position_ids" in own:
            own["position_ids"] = torch.cat([own["position_ids"], more["position_ids"]], dim=-2)
        own[CACHE] = join_running(self._config, [self.cache, other.cache], length)
        self._session = session_of(self.cache)
        places = [*range(len(self.rows)), *range(first, first + len(other.rows))]
        self.rows += other.rows
        other.rows = []
        self.keep(places)

    def taken_out(self, row: TokenSequence) -> Any:
        """The cache of one row, for another turn."""
        if self.width == 1:
            return self.cache
        place = self.rows.index(row)
        cache = join_running(self._config, [self.cache], self._length, spend=False)
        keep_rows(cache, [place], int((self._given["attention_mask"][place] == 0).sum()))
        return cache

    def leave(self) -> None:
        """Lets go of rows that are over."""
        places = [place for place, row in enumerate(self.rows) if not row.over]
        if len(places) < len(self.rows):
            self.rows = [self.rows[place] for place in places]
            if places:
                self.keep(places)

    def keep(self, places: Sequence[int]) -> None:
        """Keeps these rows of the cache, those of ``rows``; a compiled step sees as many as the next power of two."""
        wanted = list(places)
        if self._session is not None and self._session.plan.compiles and not self.alone:
            wanted += wanted[-1:] * ((1 << (len(wanted) - 1).bit_length()) - len(wanted))
        if wanted != list(range(self.width)):
            index = torch.tensor(wanted, device=self._given["attention_mask"].device)
            mask = self._given["attention_mask"][index]
            padding = int((mask == 0).sum(-1).min())
            self._given["attention_mask"] = mask[:, padding:]
            if "position_ids" in self._given:
                self._given["position_ids"] = self._given["position_ids"].index_select(-2, index)
            keep_rows(self.cache, wanted, padding)
        self._settle()

    def reports(self) -> list[LayerReport]:
        """What each layer holds; empty for the model without a plug-in."""
        return [] if self._session is None else self._session.layer_reports()

    @property
    def _config(self) -> Any:
        return self._forward.model.get_decoder().config

    @property
    def width(self) -> int:
        """Rows of the cache, of which a compiled step has more than there are."""
        return int(self._given["attention_mask"].shape[0])

    @property
    def _length(self) -> int:
        """Tokens that the cache has seen, padding included."""
        return int(self._given["attention_mask"].shape[1]) - 1

    def _settle(self) -> None:
        """After rows have come or left."""
        if self._session is not None:
            left = max((row.job.max_new_tokens - len(row.tokens) for row in self.rows), default=1)
            self._session.headroom = round_up(max(1, left))
        self.nbytes = bytes_of(self.cache)


def bytes_of(cache: Any) -> int:
    """Bytes of keys, values and linear-attention states."""
    session = session_of(cache)
    entries = cache_bytes(cache) if session is None else sum(one.kv_bytes for one in session.layer_reports())
    return entries + sum(map(state_bytes, cache.layers))
