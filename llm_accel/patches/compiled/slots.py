"""Fixed slots that decoding overwrites."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_accel.kernels.column_votes import column_votes
from llm_accel.methods.attention import AttentionView
from llm_accel.methods.roles import StepEviction, StepView
from llm_accel.methods.shard import WHOLE
from llm_accel.patches.base_attention import attend_visible, softmax_of
from llm_accel.patches.compiled.fixed import FixedLayer, Shape
from llm_accel.patches.layers import AccelLayer, SlotLayer


class FixedSlots(FixedLayer):
    """A :class:`SlotLayer` from the first decode step on with all its slots, those that it has yet to grow into empty
    on the left: growing and overwriting are one operation.

    Attributes:
        start: first slot of each row that is not empty, int64 [B].
        positions: original position of each slot, int64 [B, Hk, P], -1 where it is empty.
        scores: attention received, fp32 [B, Hk, P], or None.
        spare: slot that the next token takes, int64 [B, Hk].
    """

    taken = ("keys", "values", "positions", "scores", "spare", "start")

    def __init__(self, shape: Shape, keeper: StepEviction, layer: int, layers: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._keeper, self._layer, self._layers = keeper, layer, layers
        self.keys, self.values = shape.buffers()
        size, device = self.keys.shape[:3], shape.device
        self.start = torch.zeros(shape.rows, dtype=torch.long, device=device)
        self.positions = torch.zeros(size, dtype=torch.long, device=device)
        self.scores = torch.zeros(size, device=device) if keeper.accumulates else None
        self.spare = torch.zeros(size[:2], dtype=torch.long, device=device)
        self.is_initialized = True

    def take(self, layer: AccelLayer) -> None:
        """Entries move to the right end."""
        assert isinstance(layer, SlotLayer)
        capacity, count = self.keys.shape[2], layer.physical_length()
        layer.count_positions()
        empty = capacity - count
        self.keys[:, :, empty:], self.values[:, :, empty:] = layer.keys, layer.values
        self.positions.copy_(F.pad(layer.view().positions, (empty, 0), value=-1))
        if self.scores is not None and layer.scores is not None:
            self.scores.copy_(F.pad(layer.scores, (empty, 0)))
        self.start.fill_(empty)
        if layer.start is not None:
            self.start.add_(layer.start)
        self.spare.copy_((self.start - 1)[:, None] if layer.spare is None else layer.spare)

    def give(self, layer: AccelLayer, steps: int) -> None:
        """Slots that no row has grown into are left out; as long as there are any, the entries are in order."""
        assert isinstance(layer, SlotLayer)
        empty = int(self.start.min())
        count = self.keys.shape[2] - empty
        layer.start = self.start - empty if int(self.start.max()) > empty else None
        layer.vacant = int(self.start.max()) - empty
        if count == layer.capacity:
            tensors: tuple[Tensor | None, ...] = (self.keys, self.values, self.positions, self.scores, self.spare)
            given = (None if tensor is None else tensor.clone() for tensor in tensors)
            layer.keys, layer.values, layer.positions, layer.scores, layer.spare = given  # type: ignore[assignment]
            return
        order = self.positions.argsort(stable=True, dim=-1)[..., empty:]
        rows = order[..., None]
        layer.keys = self.keys.gather(2, rows.expand(-1, -1, -1, self.keys.shape[-1]))
        layer.values = self.values.gather(2, rows.expand(-1, -1, -1, self.values.shape[-1]))
        layer.positions = self.positions.gather(2, order)
        layer.scores = None if self.scores is None else self.scores.gather(2, order)
        layer.spare = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Puts one new entry per head into the spare slot; returns the buffers."""
        slot = self.spare[..., None]
        self.positions.scatter_(2, slot, self.positions.amax(-1, keepdim=True) + 1)
        if self.scores is not None:
            self.scores.scatter_(2, slot, 0.0)
        self.keys.scatter_(2, slot[..., None].expand(key_states.shape), key_states)
        self.values.scatter_(2, slot[..., None].expand(value_states.shape), value_states)
        self.start.copy_((self.start - 1).clamp(min=0))
        return self.keys, self.values

    def attend(self, base: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        """Over all slots that are not empty; then chooses what the next token takes."""
        softmax = softmax_of(kwargs, key.shape[-1])
        held = StepView(self.positions, self.scores)
        # all heads are here; said aloud, because the compiler takes no object from a default
        view = AttentionView(
            query, key, value, start=self.start, layer=self._layer, layers=self._layers, heads=WHOLE, **softmax
        )
        step = self._keeper.attend_and_choose(view, held)
        if step is None:
            slots = torch.arange(key.shape[2], device=key.device)
            visible = slots[None, None, None] >= self.start[:, None, None, None]
            output = attend_visible(base, module, query, key, value, visible, **kwargs)
            if self.scores is not None:
                votes = column_votes(query, key, self.start, heads=self.positions.shape[1], group="sum", **softmax)
                self.scores.mul_(self._keeper.score_decay).add_(votes)
            victims = self._keeper.victims(held)
        else:
            output, scores, victims = step
            if self.scores is not None:
                self.scores.copy_(scores)
        empty = (self.start - 1)[:, None].expand_as(victims)
        self.spare.copy_(torch.where(empty >= 0, empty, victims))
        return output
