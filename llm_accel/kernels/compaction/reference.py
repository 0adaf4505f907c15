"""Cache compaction in plain torch."""

from __future__ import annotations

from torch import Tensor


def gather_entries_reference(indices: Tensor, keys: Tensor, values: Tensor, scores: Tensor | None) -> list[Tensor]:
    """See :func:`llm_accel.kernels.compaction.gather_entries`; the scores are left out where there are none."""
    slots = indices.clamp(min=0)
    copies = [entries.gather(2, slots[..., None].expand(-1, -1, -1, entries.shape[-1])) for entries in (keys, values)]
    return copies if scores is None else [*copies, scores.gather(2, slots)]
