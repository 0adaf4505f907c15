"""Rows of several caches in one, right-aligned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def joined(parts: Sequence[Tensor | None], dim: int, empty: int) -> Tensor | None:
    """The rows of all parts in one tensor, padded with ``empty`` at the front of ``dim``; None where they are."""
    tensors = [part for part in parts if part is not None]
    if not tensors:
        return None
    longest, behind = max(tensor.shape[dim] for tensor in tensors), (0, 0) * (-1 - dim)
    return torch.cat([F.pad(part, (*behind, longest - part.shape[dim], 0), value=empty) for part in tensors])


def leading(more: Sequence[int], parts: Sequence[Any], name: str, device: Any) -> Tensor | None:
    """Leading empty places of each row, int64 [B]: what a part counts as ``name`` and ``more``; None without any."""
    rows = []
    for count, part in zip(more, parts, strict=True):
        own: Tensor | None = getattr(part, name)
        rows.append(torch.full((part.rows,), count, device=device) + (0 if own is None else own))
    total = torch.cat(rows)
    return total if bool(total.any()) else None


def lessened(places: Tensor | None, count: int) -> Tensor | None:
    """Leading empty places of each row, int64, after ``count`` of all were dropped; None where none are left."""
    if places is None:
        return None
    left = places - count
    return left if bool(left.any()) else None
