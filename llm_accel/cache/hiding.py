"""Entries that are hidden from attention and stay stored: the simulation of an eviction."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_accel.cache.attention import Attention
from llm_accel.cache.layer import AccelLayer
from llm_accel.errors import UnsupportedCallError


class HidingLayer(AccelLayer):
    """A whole cache, of which attention sees a part that each KV head chooses anew at every step. Frees nothing.

    Attributes:
        scores: attention that each stored entry has received, fp32 [B, Hk, P].
        shown: slots that attention sees, int64 [B, Hk, n], ascending, -1 first in shorter rows; None while it sees all.
        entries: entries that each row may see, int64 [B], where the prompt has fixed that, else None.
        capacity: slots at which hiding begins; None while the prompt is incomplete or nothing is ever hidden.
    """

    row_tensors = (*AccelLayer.row_tensors, "scores", "shown", "entries")
    plain_values = (*AccelLayer.plain_values, "capacity")

    def _clear(self) -> None:
        super()._clear()
        self.scores: Tensor | None = None
        self.shown: Tensor | None = None
        self.entries: Tensor | None = None
        self.capacity: int | None = None

    def add(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Appends new entries [B, Hk, T, D] and returns those that attention may see, the new ones among them."""
        super().add(key_states, value_states)
        count, stored = key_states.shape[-2], self.physical_length()
        if self.scores is not None:
            self.scores = F.pad(self.scores, (0, count))
        if self.shown is None:
            return self.keys, self.values
        newest = torch.arange(stored - count, stored, device=self.shown.device)
        self.shown = torch.cat([self.shown, newest.expand(*self.shown.shape[:2], -1)], dim=-1)
        return self.narrowed(self.shown, self.keys, self.values)

    def shown_start(self) -> Tensor | None:
        """First real slot of each row in what attention sees, int64 [B]; None when every slot is real."""
        return self.start if self.start is None or self.shown is None else (self.shown[:, 0] < 0).sum(-1)

    def attend(self, attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Dense attention over what :meth:`update` returned, [B, T, Hq, Dv]."""
        return attention.dense(query, key, value, self.shown_start())

    def accumulate(self, votes: Tensor, decay: float) -> None:
        """Adds the attention of one call to the seen entries, fp32 [B, Hk, n], to the scores; hidden ones got none."""
        if self.scores is None or self.shown is None:
            self.scores = votes if self.scores is None else self.scores * decay + votes
        else:
            self.scores = (self.scores * decay).scatter_add(2, self.shown.clamp(min=0), votes)

    def bound(self, capacity: int | None, entries: Tensor | None) -> None:
        """Sets where hiding begins; the first prompt fixes how many ``entries``, int64 [B], each row may see,
        where that is not the same for every prompt."""
        self.capacity = capacity
        self.entries = entries if self.entries is None else self.entries

    @property
    def full(self) -> bool:
        """Whether every further token sees a part of the entries only."""
        return self.capacity is not None and self.physical_length() >= self.capacity

    def show(self, slots: Tensor) -> None:
        """Hides everything but ``slots``, int64 [B, Hk, n], from what comes next."""
        self.shown, self.compressed = slots, True

    def kept_positions(self) -> Tensor | None:
        """Original positions of the entries that the next token sees beside itself, int64 [B, Hk, n], or None."""
        return None if self.shown is None else self._positions_of(self.shown)

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what the removed tokens added to the scores cannot be undone."""
        raise UnsupportedCallError("this cache adds up attention and cannot be cropped; start with a new cache.")
