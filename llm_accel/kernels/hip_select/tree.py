"""Halving tree: equal groups of blocks, the best halves of all groups live on until every group is one block.

HiP (ICLR 2025, arXiv 2406.09827), with the middle block of a half standing for it.
"""

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
    tiles,
)


@dataclass(frozen=True)
class TreeSearch:
    """The settings of a search; see :class:`llm_accel.kernels.hip_select.stages.StageSearch`.

    Args:
        stride: rows of a query block of which the last is scored.
    """

    scope: Scope
    budget: int
    stride: int = 2
    share_heads: str = "group"

    def select(self, query: Tensor, key: Tensor, start: Tensor | None) -> Tensor:
        """The chosen blocks of all query blocks, int64 [B, H, n, M], ascending, absent ones last."""
        (batch, _, queries, dim), (heads, slots) = query.shape, key.shape[1:3]
        scope, keys = self.scope, Keys.of(key, start)
        first = first_real(queries, slots, start, query.device)
        end = scope.window_start(queries, slots, start, query.device)[:, None, :, None]
        count = scope.blocks(queries)
        groups = min(self.budget, scope.most(queries, slots, count - 1)) // scope.block_k
        chosen = torch.full((batch, heads, count, groups), ABSENT, device=query.device)
        for blocks in tiles(count, 2 * batch * heads * dim * groups * scope.block_k):
            rounds = halvings(scope.most(queries, slots, blocks[-1]) // scope.block_k, groups)
            here = slice(blocks.start, blocks.stop)
            candidates = ((end[:, :, here] - scope.sink) // scope.block_k).expand(batch, heads, -1, -1)
            reps = representatives(query, heads, first, blocks, scope.block_q, self.stride, last=True)
            chosen[:, :, here] = self._halve(reps, keys, candidates, groups, rounds)
        return chosen

    def _halve(self, reps: Tensor, keys: Keys, candidates: Tensor, groups: int, rounds: int) -> Tensor:
        edges = torch.arange(groups + 1, device=reps.device) * candidates // max(groups, 1)
        begin, size = edges[..., :-1], edges.diff(dim=-1)
        for _ in range(rounds):
            left = (size + 1) // 2
            begin = torch.stack([begin, begin + left], dim=-1).flatten(-2)
            size = torch.stack([left, size - left], dim=-1).flatten(-2)
            middle = self.scope.sink + (begin + size // 2) * self.scope.block_k
            score = best_key(reps, keys, middle, self.scope.block_k)
            place = best(shared(score, self.share_heads), size > 0, groups)
            begin, size = begin.gather(-1, place), size.gather(-1, place)
        starts = self.scope.sink + begin * self.scope.block_k
        return torch.where(size > 0, starts, ABSENT).sort(dim=-1).values


def halvings(blocks: int, groups: int) -> int:
    """Rounds until groups of ``blocks`` blocks are single ones."""
    return max(0, -(-blocks // groups) - 1).bit_length() if groups else 0
