"""Every key is read: the blocks with the best key for any query of the query block. Quadratic; what the searches of
this package approximate, and a ceiling for their quality."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llm_accel.kernels.hip_select.candidates import ABSENT, Keys, best_key, best_places, representatives
from llm_accel.kernels.hip_select.search import Search


@dataclass(frozen=True)
class ExactSearch(Search):
    """Reads everything; settings as in :class:`llm_accel.kernels.hip_select.search.Search`."""

    def elements(self, keys: Keys, slots: int, width: int) -> int:
        """The keys in reach: a query block at a time, but for short prompts."""
        return slots * keys.rows.shape[-1]

    def choose(
        self, query: Tensor, keys: Keys, first: Tensor, blocks: range, end: Tensor, most: int, width: int
    ) -> Tensor:
        """The best blocks by their best key."""
        batch, heads = keys.origin.shape[:2]
        reps = representatives(query, heads, first, blocks, self.scope.block_q, 1)
        starts = torch.arange(self.scope.sink, self.scope.sink + most, self.scope.block_k, device=query.device)
        starts = starts.expand(batch, heads, len(blocks), -1)
        score = best_key(reps, keys, starts, self.scope.block_k, self.level(reps, keys, end))
        present = starts < end
        place = best_places(self.shared(score), present, width)
        return starts.masked_fill(~present, ABSENT).gather(-1, place)
