"""Fixed buffers of a layer whose KV heads are stored in two groups."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from llm_accel.cache.attention import Attention
from llm_accel.cache.grouped import HeadGroup
from llm_accel.patches.compiled.fixed import FixedLayer


class FixedGroups(FixedLayer):
    """One fixed layer per group; entries move in and out of these.

    Args:
        parts: a fixed layer for each group.
        groups: KV heads of each group.
    """

    def __init__(self, parts: Sequence[FixedLayer], groups: Sequence[HeadGroup], query_heads: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.parts = tuple(parts)
        total = sum(len(group.heads) for group in groups)
        device = parts[0].tensors()[0].device
        self._heads = tuple(group.index(device) for group in groups)
        self._readers = tuple(group.index(device, query_heads // total) for group in groups)
        self.is_initialized = True

    def tensors(self) -> list[Tensor]:
        """All buffers of the parts."""
        return [tensor for part in self.parts for tensor in part.tensors()]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Stores the new entries of each group; returns just these."""
        for part, heads in zip(self.parts, self._heads, strict=True):
            part.update(key_states.index_select(1, heads), value_states.index_select(1, heads))
        return key_states, value_states

    def attend(self, attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One call per group, merged into one output."""
        output = query.new_empty(query.shape[0], 1, query.shape[1], value.shape[-1])
        for part, readers in zip(self.parts, self._readers, strict=True):
            rows = query.index_select(1, readers)
            output[:, :, readers] = part.attend(attention, rows, part.keys, part.values)
        return output
