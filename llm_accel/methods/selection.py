"""Deterministic choice of the entries to keep. One total order for every method."""

from __future__ import annotations

import torch
from torch import Tensor

FIRST = torch.iinfo(torch.int64).max


def real_slots(start: Tensor | None, slots: int, device: torch.device) -> Tensor:
    """bool [B or 1, slots]: True where a slot holds a real token (right-aligned rows, padding on the left);
    [B, heads, slots] for a ``start`` of [B, heads]."""
    index = torch.arange(slots, device=device)
    if start is None:
        return torch.ones(1, slots, dtype=torch.bool, device=device)
    return index >= start[..., None]


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
    rank = total_order(score, valid, forced, tie_break)
    best = rank.sort(dim=-1, descending=True, stable=True).indices[..., :width]
    surplus = torch.arange(width, device=score.device)[None] >= counts[:, None]
    return best.masked_fill(surplus[:, None], -1).sort(dim=-1).values


def total_order(score: Tensor, valid: Tensor, forced: Tensor | None, tie_break: Tensor | None) -> Tensor:
    """The order of :func:`select_top` as numbers: int64 [B, H, S], higher is better, :data:`FIRST` where forced, -1
    where not valid; equal numbers are settled by the lower index. Masks are [B or 1, S] or [B, H, S]."""
    rank = _ordered_bits(score) << 31
    if tie_break is not None:
        rank = rank | _ordered_bits(tie_break)
    if forced is not None:
        rank = rank.masked_fill(_per_head(forced), FIRST)
    return rank.masked_fill(~_per_head(valid), -1)


def slots_of(kept: Tensor) -> Tensor:
    """Slots of a mask, bool [B, H, S] -> int64 [B, H, n], ascending, -1 first where a head keeps fewer than the
    longest; one device synchronisation tells n."""
    slots = kept.shape[-1]
    width = int(kept.sum(-1).max())
    index = torch.arange(slots, device=kept.device)
    return torch.where(kept, index, -1).sort(dim=-1).values[..., slots - width :]


def top_tokens(score: Tensor, count: int) -> Tensor:
    """The ``count`` best of one line of scores, fp32 >= 0 [n]; ties by the lower index. int64 [count], ascending."""
    best = _ordered_bits(score).sort(descending=True, stable=True).indices[:count]
    return best.sort().values


def evenly_spaced(count: int, kept: int, device: torch.device) -> Tensor:
    """The middle of each of ``kept`` equal stretches of ``count`` places: int64 [kept], ascending."""
    return (2 * torch.arange(kept, device=device) + 1) * count // max(1, 2 * kept)


def uniform(position: Tensor, stream: Tensor) -> Tensor:
    """fp32 in [0, 1) from a hash of position and stream, so that a row draws the same alone and in a batch."""
    mixed = (position + 1) * 0x9E3779B1 + stream * 0x85EBCA77
    for multiplier in (0x2C1B3C6D, 0x297A2D39):
        mixed = mixed & 0xFFFFFFFF
        mixed = ((mixed ^ (mixed >> 15)) * multiplier) & 0xFFFFFFFF
    mixed = mixed ^ (mixed >> 16)
    return (mixed & 0xFFFFFF).float() / float(1 << 24)


def _per_head(mask: Tensor) -> Tensor:
    """A mask of rows or of heads with a dimension for the heads."""
    return mask[:, None] if mask.ndim == 2 else mask


def _ordered_bits(score: Tensor) -> Tensor:
    """int64 in [0, 2**31) with the order of the non-negative fp32 values; NaN counts as 0."""
    clean = torch.nan_to_num(score.float(), nan=0.0).clamp(min=0.0) + 0.0
    return clean.view(torch.int32).long()
