"""Deterministic choice of the entries to keep. One total order for every method."""

from __future__ import annotations

import torch
from torch import Tensor

_FIRST = torch.iinfo(torch.int64).max


def real_slots(start: Tensor | None, slots: int, device: torch.device) -> Tensor:
    """bool [B or 1, slots]: True where a slot holds a real token (right-aligned rows, padding on the left)."""
    index = torch.arange(slots, device=device)
    if start is None:
        return torch.ones(1, slots, dtype=torch.bool, device=device)
    return index[None] >= start[:, None]


def select_top(
    score: Tensor,
    counts: Tensor,
    width: int,
    valid: Tensor,
    forced: Tensor | None = None,
    tie_break: Tensor | None = None,
) -> Tensor:
    """The best entries of each row and head by a total order: forced first, then ``score``, then ``tie_break``,
    then the lower index.

    Args:
        score: fp32 >= 0, [B, H, S].
        counts: entries that each row keeps, int64 [B]; at most ``width``.
        width: n, entries in the longest row.
        valid: bool [B or 1, S], slots that may be kept at all.
        forced: bool [B or 1, S], slots that are kept before any other.
        tie_break: fp32 >= 0, [B, H, S], compared where ``score`` is equal.

    Returns:
        int64 [B, H, width], ascending, -1 first where a row keeps fewer than ``width``.
    """
    rank = _ordered_bits(score) << 31
    if tie_break is not None:
        rank = rank | _ordered_bits(tie_break)
    if forced is not None:
        rank = rank.masked_fill(forced[:, None], _FIRST)
    rank = rank.masked_fill(~valid[:, None], -1)
    best = rank.sort(dim=-1, descending=True, stable=True).indices[..., :width]
    surplus = torch.arange(width, device=score.device)[None] >= counts[:, None]
    return best.masked_fill(surplus[:, None], -1).sort(dim=-1).values


def _ordered_bits(score: Tensor) -> Tensor:
    """int64 in [0, 2**31) with the order of the non-negative fp32 values; NaN counts as 0."""
    clean = torch.nan_to_num(score.float(), nan=0.0).clamp(min=0.0) + 0.0
    return clean.view(torch.int32).long()
