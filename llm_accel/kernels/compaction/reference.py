"""Cache compaction in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_entries_reference(indices: Tensor, keys: Tensor, values: Tensor, scores: Tensor | None) -> list[Tensor]:
    """See :func:`llm_accel.kernels.compaction.gather_entries`; the scores are left out where there are none."""
    slots = indices.clamp(min=0)
    copies = [_rows(keys, slots), _rows(values, slots)]
    return copies if scores is None else [*copies, scores.gather(2, slots)]


def _rows(entries: Tensor, slots: Tensor) -> Tensor:
    if entries.dtype.is_floating_point and entries.element_size() == 1:  # torch gathers no 8-bit floats
        return _rows(entries.view(torch.uint8), slots).view(entries.dtype)
    return entries.gather(2, slots[..., None].expand(-1, -1, -1, entries.shape[-1]))
