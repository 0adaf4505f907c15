"""Fixed pages for heads that hold different numbers of entries."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_accel.cache import AccelLayer, RaggedLayer
from llm_accel.cache.attention import Attention
from llm_accel.cache.ragged import numbered
from llm_accel.kernels.ragged_decode import ragged_attention
from llm_accel.patches.compiled.fixed import FixedLayer, Shape


class FixedPages(FixedLayer):
    """A :class:`RaggedLayer` whose heads own all the pages that they will need.

    Attributes:
        keys, values: pools of pages, [N, page, D] and [N, page, Dv].
        table: pages of each row and head in order, int64 [B, Hk, M], -1 after the last.
        lengths: entries of each row and head, int64 [B, Hk].

    Args:
        shape: with the entries per head, on average, that there will be room for.
        page: entries per page.
        room: of these, those that are yet to come.
    """

    taken = ("keys", "values", "table", "start")

    def __init__(self, shape: Shape, page: int, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._room = room
        entries = shape.heads * shape.capacity
        pages = shape.rows * (-(-entries // page) + shape.heads)  # every head may leave a page half full
        pool = Shape(pages, 1, page, shape.key_width, shape.value_width, shape.dtype, shape.device)
        self.keys, self.values = (buffer[:, 0] for buffer in pool.buffers())
        longest = entries - shape.heads * room + room
        size = (shape.rows, shape.heads, -(-longest // page))
        self.table = torch.full(size, -1, dtype=torch.long, device=shape.device)
        self.lengths = torch.zeros(size[:2], dtype=torch.long, device=shape.device)
        self.is_initialized = True

    def take(self, layer: AccelLayer) -> None:
        """Copies the pages of each head to the first of those that it has here."""
        assert isinstance(layer, RaggedLayer) and layer.table is not None
        page = self.keys.shape[1]
        self.lengths.copy_(layer.lengths())
        table, _ = numbered((self.lengths + self._room + page - 1) // page)
        self.table.fill_(-1)
        self.table[..., : table.shape[2]] = table
        owner = (layer.table >= 0).nonzero(as_tuple=True)
        source, target = layer.table[owner], self.table[owner]
        self.keys[target], self.values[target] = layer.keys[source], layer.values[source]

    def give(self, layer: AccelLayer, steps: int) -> None:
        """Copies the pages that hold something."""
        assert isinstance(layer, RaggedLayer)
        page = self.keys.shape[1]
        pages = (self.lengths + page - 1) // page
        layer.table, layer.used = numbered(pages)
        filled = self.table[..., : layer.table.shape[2]][layer.table >= 0]
        layer.keys, layer.values = self.keys[filled], self.values[filled]
        layer.longest += steps
        layer.start = layer.longest - self.lengths
        layer.room = int((pages * page - self.lengths).min())

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Writes one new entry per head; returns just these, :meth:`attend` reads the pool."""
        page = self.keys.shape[1]
        owned = self.table.gather(2, (self.lengths // page)[..., None])[..., 0]
        slot = owned * page + self.lengths % page
        self.keys.view(-1, self.keys.shape[-1])[slot] = key_states[:, :, 0]
        self.values.view(-1, self.values.shape[-1])[slot] = value_states[:, :, 0]
        self.lengths.add_(1)
        return key_states, value_states

    def attend(self, attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Over the entries of each head alone."""
        softmax = attention.softmax(query.shape[-1])
        return ragged_attention(query, self.keys, self.values, self.table, self.lengths, **softmax)
