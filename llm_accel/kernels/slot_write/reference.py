"""Slot write in plain torch."""

from __future__ import annotations

from torch import Tensor


def slot_write_reference(
    keys: Tensor,
    values: Tensor,
    new_key: Tensor,
    new_value: Tensor,
    spare: Tensor,
    positions: Tensor,
    scores: Tensor | None,
) -> list[Tensor]:
    """See :func:`llm_accel.kernels.slot_write.slot_write`; the scores are left out where there are none."""
    slot = spare[..., None]
    known = [positions.scatter(2, slot, positions.amax(-1, keepdim=True) + 1)]
    if scores is not None:
        known.append(scores.scatter(2, slot, 0.0))
    for held, new in ((keys, new_key), (values, new_value)):
        held.scatter_(2, slot[..., None].expand(-1, -1, 1, held.shape[-1]), new)
    return known
