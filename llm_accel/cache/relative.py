"""Slots whose keys stand at their rank in the cache, so that a stream may run past the trained context."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from llm_accel.cache.autograd_modes import writable
from llm_accel.cache.slots import SlotLayer


class Rotation(Protocol):
    """The rotary embedding of a model."""

    def turn(self, key: Tensor, positions: Tensor) -> Tensor:
        """Unrotated keys [B, H, P, D] as they stand at ``positions``, int64 [B, P]."""

    def turn_back(self, key: Tensor, positions: Tensor) -> Tensor:
        """Keys [B, H, P, D] rotated at ``positions``, int64 [B, P], without their rotation."""


class RelativeSlotLayer(SlotLayer):
    """Keys are stored without their rotation and turned at each read. All heads keep the same entries."""

    def next_positions(self, count: int) -> Tensor:
        """Positions of ``count`` new tokens: the ranks they will have, int64 [B, count]."""
        device, batch = self.keys.device, self.keys.shape[0]
        start = torch.zeros(batch, dtype=torch.long, device=device) if self.start is None else self.start
        first = self.physical_length() - start
        if count == 1 and self.spare is not None:
            first = first - (start == 0).long()  # the newest token takes the place of the oldest
        return first[:, None] + torch.arange(count, device=device)

    def turned_keys(self, rotary: Rotation | None, given: Tensor, arrived_at: Tensor | None) -> Tensor:
        """Stores the newest keys without their rotation; returns all keys as attention must see them.

        Args:
            rotary: the model's rotary embedding.
            given: keys as :meth:`update` returned them, [B, Hk, P, D].
            arrived_at: positions at which the newest tokens were rotated, int64 [B, T].
        """
        assert rotary is not None and arrived_at is not None
        self.count_positions()
        if arrived_at.shape[1] == self.physical_length():
            self.keys = rotary.turn_back(given, arrived_at)
            return given
        newest = self._newest(arrived_at.shape[1])
        upright = rotary.turn_back(self.keys.gather(2, self._rows(newest)), arrived_at)
        self.keys = writable(self.keys, upright)
        self.keys.scatter_(2, self._rows(newest), upright)
        return rotary.turn(self.keys, slot_ranks(self.seen_positions()[:, 0]))

    def _newest(self, count: int) -> Tensor:
        """Slots of the newest ``count`` tokens, oldest first, int64 [B, count]."""
        return self.seen_positions()[:, 0].topk(count, dim=-1).indices.flip(-1)

    def _rows(self, slots: Tensor) -> Tensor:
        return slots[:, None, :, None].expand(-1, self.keys.shape[1], -1, self.keys.shape[-1])


def slot_ranks(positions: Tensor) -> Tensor:
    """Rank of each slot among the real ones of its row, int64 [B, P], from original positions [B, P]; 0 if empty."""
    order = positions.argsort(dim=-1).argsort(dim=-1)
    empty = (positions < 0).sum(-1, keepdim=True)
    return torch.clamp(order - empty, min=0)
