"""Deterministic choice of the entries to keep. One total order for every method."""

from __future__ import annotations

import torch
from torch import Tensor

FIRST = torch.iinfo(torch.int64).max
ABSENT = torch.iinfo(torch.int64).min
_UNORDERED = -0x7F800002  # NaN, one below the number of -inf


def per_head(mask: Tensor) -> Tensor:
    """A mask of rows, [B, S], or of heads, [B, H, S], with a dimension for the heads."""
    return mask[:, None] if mask.ndim == 2 else mask


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
        score: of any sign, [B, H, S]; compared as fp32, with -0.0 equal to 0.0 and NaN below everything else.
        counts: entries that each row keeps, int64 [B]; at most ``width``.
        width: n, entries in the longest row.
        valid: bool [B or 1, S] or [B, H, S], slots that may be kept at all.
        forced: bool of such a shape, slots that are kept before any other.
        tie_break: as ``score``, compared where that is equal.

    Returns:
        int64 [B, H, width], ascending, -1 first where a row keeps fewer than ``width``.
    """
    return best_slots(total_order(score, valid, forced, tie_break), counts, width)


def total_order(score: Tensor, valid: Tensor, forced: Tensor | None, tie_break: Tensor | None) -> Tensor:
    """The order of :func:`select_top` as numbers: int64 [B, H, S], higher is better, :data:`FIRST` where forced and
    :data:`ABSENT` where not valid, between which all others lie; equal numbers are settled by the lower index."""
    priority = _ordered_bits(score) << 32
    if tie_break is not None:
        priority = priority + (_ordered_bits(tie_break) + 2**31)  # the lower half counts from 0
    if forced is not None:
        priority = priority.masked_fill(per_head(forced), FIRST)
    return priority.masked_fill(~per_head(valid), ABSENT)


def best_slots(priority: Tensor, counts: Tensor, width: int) -> Tensor:
    """The ``counts``, int64 [B], best slots of each row and head in a :func:`total_order` [B, H, S]; returned as by
    :func:`select_top`."""
    best = priority.sort(dim=-1, descending=True, stable=True).indices[..., :width]
    surplus = torch.arange(width, device=priority.device)[None] >= counts[:, None]
    return best.masked_fill(surplus[:, None], -1).sort(dim=-1).values


def without(kept: Tensor, wanted: Tensor, valid: Tensor) -> Tensor:
    """Rows that keep fewer slots than they must: bool [B].

    Args:
        kept: slots as :func:`select_top` returns them, int64 [B, H, n].
        wanted: slots that must be among them, bool [B or 1, S] or [B, H, S].
        valid: as for :func:`select_top`; others are never wanted.
    """
    missing = (per_head(wanted) & per_head(valid)).expand(*kept.shape[:2], -1)
    found = torch.zeros(*kept.shape[:2], missing.shape[-1] + 1, dtype=torch.bool, device=kept.device)
    found = found.scatter(2, kept.where(kept >= 0, missing.shape[-1]), True)[..., :-1]
    return (missing & ~found).any(-1).any(-1)


def slots_of(kept: Tensor) -> Tensor:
    """Slots of a mask, bool [B, H, S] -> int64 [B, H, n], ascending, -1 first where a head keeps fewer than the
    longest; one device synchronisation tells n."""
    slots = kept.shape[-1]
    width = int(kept.sum(-1).max())
    index = torch.arange(slots, device=kept.device)
    return torch.where(kept, index, -1).sort(dim=-1).values[..., slots - width :]


def top_tokens(score: Tensor, count: int) -> Tensor:
    """The ``count`` best of one line of scores [n], ordered as by :func:`select_top`; int64 [count], ascending."""
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


def _ordered_bits(score: Tensor) -> Tensor:
    """int64 with the order of all fp32 values, from -2**31 + 2**23 - 2 for NaN to 2**31 - 2**23 for infinity."""
    bits = (score.float() + 0.0).view(torch.int32)  # adding turns -0.0 into 0.0
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # the larger the magnitude of a negative value, the smaller its number
    return bits.masked_fill(score.isnan(), _UNORDERED).long()
