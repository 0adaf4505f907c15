"""A cache layer that knows which of its entries a method has marked, through evictions and in every head."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_accel.cache.layer import AccelLayer


class MarkedLayer(AccelLayer):
    """Keys and values as in the base.

    Attributes:
        marks: of each entry, int8 [B, Hk, P], 0 where it has none; None before the first mark.
        columns: slots of the marked entries, int64 [B, Hk, n], once they were looked for since marks last changed.
        shifted, asked: pairs of a query and a head whose attention was corrected, and those that might have been, int64
            [] each; None before the first.
    """

    row_tensors = (*AccelLayer.row_tensors, "marks")
    shared_tensors = (*AccelLayer.shared_tensors, "shifted", "asked")
    per_slot = (*AccelLayer.per_slot, "marks")
    slotted = AccelLayer.slotted | {"marks": (-1, 0)}

    def _clear(self) -> None:
        super()._clear()
        self.marks: Tensor | None = None
        self.shifted: Tensor | None = None
        self.asked: Tensor | None = None
        self.columns: Tensor | None = None

    def _place(self, count: int) -> None:
        super()._place(count)
        if self.marks is not None:
            self.marks = F.pad(self.marks, (0, count))

    def mark(self, marks: Tensor) -> None:
        """Marks the newest entries, int8 [B, n]."""
        if self.marks is None and not bool(marks.any()):
            return
        before = self.physical_length() - marks.shape[1]
        newest = marks.to(self.keys.device)[:, None].expand(-1, self.kv_heads, -1)
        if self.marks is None:
            self.marks = F.pad(newest, (before, 0))
        else:
            self.marks = torch.cat([self.marks[..., :before], newest], dim=-1)
        self.columns = None

    def count(self, shifted: Tensor, asked: Tensor) -> None:
        """Adds to the numbers of the report, int64 [] each."""
        self.shifted = shifted if self.shifted is None else self.shifted + shifted
        self.asked = asked if self.asked is None else self.asked + asked

    def _gather(self, indices: Tensor) -> None:
        super()._gather(indices)
        if self.marks is not None:
            self.marks = self.marks.gather(-1, indices.clamp(min=0)).masked_fill(indices < 0, 0)
        self.columns = None

    def _drop_oldest(self, count: int) -> None:
        super()._drop_oldest(count)
        self.columns = None

    def _drop_newest(self, count: int) -> None:
        super()._drop_newest(count)
        if self.marks is not None:
            self.marks = self.marks[..., : self.marks.shape[-1] - count]
        self.columns = None

    def _map_rows(self, change: Any) -> None:
        super()._map_rows(change)
        self.columns = None

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """As in the base; where the marked entries lie is worked out anew."""
        super().restore(tensors, values)
        self.columns = None
