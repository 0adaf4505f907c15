"""What one query sees of a row that fills the first slots of a buffer, as pages for ragged attention."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_accel.kernels.hip_select.candidates import ABSENT, Scope


def paged(
    chosen: Tensor, scope: Scope, begin: Tensor, lengths: Tensor, capacity: int, recent: int
) -> tuple[Tensor, Tensor]:
    """The sink, the chosen blocks and what follows ``begin``, in this order, as pages of ``scope.block_k`` slots.

    Args:
        chosen: blocks of one query per row, int64 [B, H, M], ascending and absent ones last.
        begin: first position of the window, int64 [B]; a multiple of the block.
        lengths: filled slots of each row, int64 [B].
        capacity: slots of the buffers [B, H, C, D], a multiple of the block.
        recent: slots from ``begin`` on, at most.

    Returns:
        The table of pages, int64 [B, H, P], -1 after the last; and how many entries it holds, int64 [B, H].
    """
    block, heads = scope.block_k, chosen.shape[1]
    sink, count = scope.sink // block, (chosen < ABSENT).sum(-1)
    entries = (sink + count) * block + (lengths - begin)[:, None]
    place = torch.arange(sink + chosen.shape[2] + -(-recent // block), device=chosen.device)
    listed = chosen.gather(2, (place - sink).clamp(0, chosen.shape[2] - 1).expand(*chosen.shape[:2], -1)) // block
    near = (begin // block)[:, None, None] + place - sink - count[..., None]
    page = torch.where(place < sink, place, torch.where(place < sink + count[..., None], listed, near))
    owner = torch.arange(chosen.shape[0] * heads, device=chosen.device).view(-1, heads, 1) * (capacity // block)
    return torch.where(place * block < entries[..., None], owner + page, -1), entries
