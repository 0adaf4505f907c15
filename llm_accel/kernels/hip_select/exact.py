"""Every key is read: the blocks with the best key for any query of the query block. Quadratic; what the searches of
this package approximate, and a ceiling for their quality."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llm_accel.kernels.hip_select.candidates import (
    ABSENT,
    Keys,
    Scope,
    best,
    best_key,
    first_real,
    representatives,
    shared,
)

AT_ONCE = 2**11  # blocks whose keys are gathered together


@dataclass(frozen=True)
class ExactSearch:
    """The settings of a search; see :class:`llm_accel.kernels.hip_select.stages.StageSearch`."""

    scope: Scope
    budget: int
    share_heads: str = "group"

    def select(self, query: Tensor, key: Tensor, start: Tensor | None) -> Tensor:
        """The chosen blocks of all query blocks, int64 [B, H, n, M], ascending, absent ones last."""
        (batch, _, queries, _), (heads, slots) = query.shape, key.shape[1:3]
        scope, keys = self.scope, Keys.of(key, start)
        first = first_real(queries, slots, start, query.device)
        end = scope.window_start(queries, slots, start, query.device)[:, None, :, None]
        count = scope.blocks(queries)
        width = min(self.budget, scope.most(queries, slots, count - 1)) // scope.block_k
        chosen = torch.full((batch, heads, count, width), ABSENT, device=query.device)
        for block in range(count):
            most = scope.most(queries, slots, block)
            if most == 0:
                continue
            reps = representatives(query, heads, first, range(block, block + 1), scope.block_q, 1)
            starts = torch.arange(scope.sink, scope.sink + most, scope.block_k, device=query.device)
            starts = starts.expand(batch, heads, 1, -1)
            parts = starts.split(AT_ONCE, dim=-1)
            score = torch.cat([best_key(reps, keys, part, scope.block_k) for part in parts], dim=-1)
            present = starts < end[:, :, block : block + 1]
            place = best(shared(score, self.share_heads), present, width)
            found = starts.masked_fill(~present, ABSENT).gather(-1, place)
            chosen[:, :, block : block + 1, : found.shape[-1]] = found
        return chosen
