"""Fixed buffers to which decoding appends."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_accel.cache import AccelLayer
from llm_accel.cache.attention import Attention
from llm_accel.kernels import ragged_decode
from llm_accel.kernels.dispatch import Problem
from llm_accel.patches.compiled.fixed import GRANULE, FixedLayer, Shape


class FixedEntries(FixedLayer):
    """Keys and values [B, Hk, C, D]; row ``b`` holds its entries in slots ``0..lengths[b]-1``, oldest first.

    Attributes:
        lengths: entries of each row, int64 [B].
        pages: the same slots as pages of the ragged kernel, int64 [B, Hk, C / 64]; None where it does not run.
        held: entries per row, padding included, that were taken over.

    Args:
        group: query heads per KV head; None where the model expands what is stored before attention sees it.
    """

    def __init__(self, shape: Shape, group: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values = shape.buffers()
        self.lengths = torch.zeros(shape.rows, dtype=torch.long, device=shape.device)
        self.pages: Tensor | None = None
        if group is not None and _has_kernel(shape, group):
            count = shape.rows * shape.heads * shape.capacity // GRANULE
            self.pages = torch.arange(count, device=shape.device).view(shape.rows, shape.heads, -1)
        self.held = 0
        self.is_initialized = True

    def take(self, layer: AccelLayer) -> None:
        """Rows move to the left, past their padding."""
        count = self.held = layer.physical_length()
        source = torch.arange(count, device=self.keys.device).expand(self.keys.shape[0], -1)
        if layer.start is not None:
            source = (source + layer.start[:, None]).clamp(max=count - 1)
        for mine, theirs in ((self.keys, layer.keys), (self.values, layer.values)):
            mine[:, :, :count] = theirs if layer.start is None else _slots(theirs, source)
        self.lengths.fill_(count)
        if layer.start is not None:
            self.lengths.sub_(layer.start)

    def give(self, layer: AccelLayer, steps: int) -> None:
        """Rows move back to the right."""
        count = self.held + steps
        source = torch.arange(count, device=self.keys.device).expand(self.keys.shape[0], -1)
        if layer.start is not None:
            source = (source - layer.start[:, None]).clamp(min=0)
        layer.keys, layer.values = _slots(self.keys, source), _slots(self.values, source)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Writes one new entry per row; returns the buffers."""
        slot = self.lengths[:, None, None, None]
        self.keys.scatter_(2, slot.expand(key_states.shape), key_states)
        self.values.scatter_(2, slot.expand(value_states.shape), value_states)
        self.lengths.add_(1)
        return self.keys, self.values

    def attend(self, attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Over the entries of each row alone where there is a kernel for it, else over the buffers under a mask."""
        if self.pages is not None:
            keys, values = (pool.view(-1, GRANULE, pool.shape[-1]) for pool in (self.keys, self.values))
            lengths = self.lengths[:, None].expand(self.pages.shape[:2])
            softmax = attention.softmax(query.shape[-1])
            return ragged_decode.ragged_attention(query, keys, values, self.pages, lengths, **softmax)
        slots = torch.arange(key.shape[2], device=key.device)
        visible = slots[None, None, None] < self.lengths[:, None, None, None]
        return attention.visible(query, key, value, visible)


def _has_kernel(shape: Shape, group: int) -> bool:
    problem = Problem(shape.device, shape.dtype, max(shape.key_width, shape.value_width), group)
    return ragged_decode.OP.choose(problem).name == "triton"


def _slots(entries: Tensor, source: Tensor) -> Tensor:
    """Slots ``source``, int64 [B, n], of [B, H, C, D] in every head."""
    index = source[:, None, :, None].expand(-1, entries.shape[1], -1, entries.shape[-1])
    return entries.gather(2, index)
