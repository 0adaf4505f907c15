"""Appending to long caches without copying them at every step."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor

LONG = 4096  # slots from which on copying costs more than headroom does
SHARE = 64  # slots for each of which there is one of headroom: 1.6 % more memory


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


def appended(held: Tensor, new: Tensor) -> Tensor:
    """Entries ``held`` [B, H, n, D] with ``new`` [B, H, t, D] behind them. A long ``held`` gets storage with
    headroom, into which the next single entries are only written; ``held`` itself stays what it is."""
    count = held.shape[2] + new.shape[2]
    if held.shape[2] < LONG or new.shape[2] > 1 or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.cat([held, new], dim=-2)
    room: Headroom | None = getattr(held, "llm_accel_headroom", None)
    fits = room is not None and room["filled"] == held.shape[2] and count <= room["slots"]
    if room is None or not fits or held.is_inference() != torch.is_inference_mode_enabled():
        room = Headroom(slots=count + count // SHARE, filled=count)
        whole = held.new_empty(*held.shape[:2], room["slots"], held.shape[3])
        whole[:, :, : held.shape[2]] = held
        longer = whole[:, :, :count]
    else:
        room["filled"] = count
        longer = held.as_strided((*held.shape[:2], count, held.shape[3]), held.stride(), held.storage_offset())
    longer[:, :, held.shape[2] :] = new
    longer.llm_accel_headroom = room  # type: ignore[attr-defined]
    return longer
