"""Halving tree: equal groups of blocks, the best halves of all groups live on until every group is one block.

HiP (ICLR 2025, arXiv 2406.09827), with the middle block of a half standing for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llm_accel.kernels.hip_select.candidates import ABSENT, Keys, best_key, best_places, representatives
from llm_accel.kernels.hip_select.search import Search


@dataclass(frozen=True)
class TreeSearch(Search):
    """The settings of a search; see :class:`llm_accel.kernels.hip_select.search.Search`.

    Args:
        stride: rows of a query block of which the last is scored.
    """

    stride: int = 2

    def elements(self, keys: Keys, slots: int, width: int) -> int:
        """The middle blocks of both halves of every group."""
        return 2 * keys.rows.shape[-1] * width * self.scope.block_k

    def choose(
        self, query: Tensor, keys: Keys, first: Tensor, blocks: range, end: Tensor, most: int, width: int
    ) -> Tensor:
        """``width`` equal groups, halved until the groups are single blocks."""
        batch, heads = keys.origin.shape[:2]
        rounds = halvings(most // self.scope.block_k, width)
        candidates = ((end - self.scope.sink) // self.scope.block_k).expand(batch, heads, -1, -1)
        reps = representatives(query, heads, first, blocks, self.scope.block_q, self.stride, last=True)
        return self._halve(reps, keys, self.level(reps, keys, end), candidates, width, rounds)

    def _halve(
        self, reps: Tensor, keys: Keys, level: Tensor | None, candidates: Tensor, groups: int, rounds: int
    ) -> Tensor:
        edges = torch.arange(groups + 1, device=reps.device) * candidates // max(groups, 1)
        begin, size = edges[..., :-1], edges.diff(dim=-1)
        for _ in range(rounds):
            left = (size + 1) // 2
            begin = torch.stack([begin, begin + left], dim=-1).flatten(-2)
            size = torch.stack([left, size - left], dim=-1).flatten(-2)
            middle = self.scope.sink + (begin + size // 2) * self.scope.block_k
            score = best_key(reps, keys, middle, self.scope.block_k, level)
            place = best_places(self.shared(score), size > 0, groups)
            begin, size = begin.gather(-1, place), size.gather(-1, place)
        starts = self.scope.sink + begin * self.scope.block_k
        return torch.where(size > 0, starts, ABSENT).sort(dim=-1).values


def halvings(blocks: int, groups: int) -> int:
    """Rounds until groups of ``blocks`` blocks are single ones."""
    return max(0, -(-blocks // groups) - 1).bit_length() if groups else 0
