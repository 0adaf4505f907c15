"""Appending to long caches without copying them at every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

LONG = 4096  # slots from which on copying costs more than headroom does
SHARE = 64  # slots for each of which there is one of headroom: 1.6 % more memory
LARGE = 2**20  # bytes from which on announced tokens get headroom
AHEAD = 64  # slots of it at most


class Headroom(TypedDict):
    """Storage with headroom, as an attribute of the tensors that lie in it: plain data, which every way of storing
    tensors takes. What is made from these, a copy, a slice or a selection, has no such attribute and is an ordinary
    tensor.

    Attributes:
        slots: that the storage has.
        filled: how many of them are written; only a tensor that ends there may go on.
    """

    slots: int
    filled: int


def appended(held: Tensor, new: Tensor, coming: int = 0) -> Tensor:
    """Entries ``held`` [B, H, n, D] with ``new`` [B, H, t, D] behind them. A long ``held``, or a large one that
    ``coming`` more are announced for, gets storage with headroom, into which the next single entries are only written;
    ``held`` itself stays what it is."""
    count = held.shape[2] + new.shape[2]
    if new.shape[2] > 1 or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.cat([held, new], dim=-2)
    room: Headroom | None = getattr(held, "llm_accel_headroom", None)
    fits = room is not None and room["filled"] == held.shape[2] and count <= room["slots"]
    if room is not None and fits and held.is_inference() == torch.is_inference_mode_enabled():
        room["filled"] = count
        longer = held.as_strided((*held.shape[:2], count, held.shape[3]), held.stride(), held.storage_offset())
        longer.llm_accel_headroom = room  # type: ignore[attr-defined]
    else:
        slots = count + (count // SHARE if held.shape[2] >= LONG else _ahead(held.nbytes, coming))
        if slots == count:
            return torch.cat([held, new], dim=-2)
        longer = _allocated(held, held.shape[0], count, slots)
        longer[:, :, : held.shape[2]] = held
    longer[:, :, held.shape[2] :] = new
    return longer


def gathered(parts: Sequence[Tensor], coming: int) -> Tensor:
    """The rows of all ``parts``, each [b, H, n, D], right-aligned in one tensor with zeros in front, whose storage has
    headroom for announced tokens."""
    count, rows = max(part.shape[2] for part in parts), sum(part.shape[0] for part in parts)
    ahead = _ahead(rows * count * parts[0][0, :, :1].nbytes, coming)
    whole, first = _allocated(parts[0], rows, count, count + ahead), 0
    for part in parts:
        own, empty = whole[first : first + part.shape[0]], count - part.shape[2]
        own[:, :, :empty] = 0
        own[:, :, empty:] = part
        first += part.shape[0]
    return whole


def selected(entries: Tensor, rows: Tensor, coming: int) -> Tensor:
    """A copy of ``rows``, int64 [n], of entries [B, H, n, D], with headroom as :func:`gathered` gives it."""
    count = entries.shape[2]
    ahead = _ahead(len(rows) * count * entries[0, :, :1].nbytes, coming)
    whole = _allocated(entries, len(rows), count, count + ahead)
    for place, row in enumerate(rows.tolist()):
        whole[place] = entries[row]
    return whole


def _ahead(nbytes: int, coming: int) -> int:
    return max(0, min(coming, AHEAD)) if nbytes >= LARGE else 0


def _allocated(like: Tensor, rows: int, count: int, slots: int) -> Tensor:
    whole = like.new_empty(rows, like.shape[1], slots, like.shape[3])[:, :, :count]
    if slots > count:
        whole.llm_accel_headroom = Headroom(slots=slots, filled=count)  # type: ignore[attr-defined]
    return whole
