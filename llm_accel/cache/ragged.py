"""Pages that belong to one row and head each, so that heads of a layer can hold different numbers of entries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_accel.cache.attention import Attention
from llm_accel.cache.autograd_modes import writable
from llm_accel.cache.fixed import FixedForm, FixedSpec
from llm_accel.cache.layer import AccelLayer
from llm_accel.cache.store import held
from llm_accel.kernels.ragged_decode import ragged_attention


class Heads(Protocol):
    """Which of a layer's heads are here, where processes share them."""

    @property
    def count(self) -> int:
        """Processes that share the heads."""
        ...

    def sum(self, own: Tensor) -> Tensor:
        """Sum over the processes, of any shape."""
        ...


class RaggedLayer(AccelLayer):
    """:class:`AccelLayer` until the first eviction. From then on ``keys`` and ``values`` are pools of pages,
    [N, page, D], and each row and head owns as many pages as its entries fill. Compaction allocates exactly those;
    where decoding needs more, the pool grows by a page for each row and head, so that it is copied once in ``page``
    steps at most. A layer with a single KV head has nothing to share out and stays as it is.

    To methods the entries look right-aligned, as in :class:`AccelLayer`: head ``h`` of row ``b`` holds slots
    ``start[b, h]..P-1`` of the longest head's P.

    Attributes:
        page: entries per page.
        heads: which of the layer's heads are here; averages are over all of them, so that processes agree.
        table: pages of each row and head in order, int64 [B, Hk, M], -1 after the last; None before the first eviction.
        longest: entries of the longest head.
        excess: how many of these are more than :meth:`mean_length`, known without a synchronisation.
        used: pages of the pool that have an owner; they come first.
        headroom: tokens that fit every row and head at least before pages are needed, known without a synchronisation.
        start: int64 [B, Hk] once there is a table.
    """

    shared_tensors = ("table",)
    table: Tensor | None = held("table")
    plain_values = (*AccelLayer.plain_values, "longest", "excess", "used", "headroom")

    def __init__(self, page: int, heads: Heads) -> None:
        self.page, self.heads = page, heads
        super().__init__()

    def _clear(self) -> None:
        super()._clear()
        self.table = None
        self.longest = self.excess = self.used = self.headroom = 0

    @property
    def rows(self) -> int:
        return super().rows if self.is_fixed or self.table is None else self.table.shape[0]

    @property
    def kv_heads(self) -> int:
        return super().kv_heads if self.table is None else self.table.shape[1]

    def lengths(self) -> Tensor:
        """Entries of each row and head, int64 [B, Hk]."""
        assert self.start is not None
        return self.longest - self.start

    def physical_length(self) -> int:
        """Entries of the longest head."""
        return super().physical_length() if self.table is None else self.longest

    def mean_length(self) -> int:
        """Entries per head of the row that holds most, rounded up."""
        return super().mean_length() if self.table is None else self.longest - self.excess

    def row_lengths(self) -> Tensor:
        """Real entries of each row, per KV head on average and rounded up, int64 [B]."""
        if self.table is None:
            return super().row_lengths()
        every = self.kv_heads * self.heads.count
        return (self.heads.sum(self.lengths().sum(-1)) + every - 1) // every

    def token_bytes(self) -> int:
        """Bytes that one token takes in all rows and heads."""
        if self.table is None:
            return super().token_bytes()
        width = self.keys.shape[-1] + self.values.shape[-1]
        return self.table.shape[0] * self.table.shape[1] * width * self.keys.element_size()

    def add(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Appends new entries [B, Hk, T, D]. Returns all stored ones before the first eviction, afterwards the new ones
        alone: :meth:`attend` reads the pool."""
        if self.table is None:
            return super().add(key_states, value_states)
        count = key_states.shape[-2]
        self._admit(count)
        if count > self.headroom:
            self._reserve(count)
        entries = self.lengths()[..., None]
        if count > 1:
            entries = entries + torch.arange(count, device=self.keys.device)
        slots = self._slots(self.table, entries)
        self.keys, self.values = writable(self.keys, key_states), writable(self.values, value_states)
        self.keys.view(-1, self.keys.shape[-1])[slots] = key_states
        self.values.view(-1, self.values.shape[-1])[slots] = value_states
        self.longest += count
        self.headroom -= count
        self._place(count)
        return key_states, value_states

    def attend(self, attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of the newest queries over all stored entries, [B, T, Hq, Dv]."""
        if self.table is None:
            return super().attend(attention, query, key, value)
        softmax = attention.softmax(query.shape[-1])
        return ragged_attention(query, self.keys, self.values, self.table, self.lengths(), **softmax)

    def all_keys(self, key: Tensor) -> Tensor:
        """Keys of all entries, [B, Hk, P, D], right-aligned; ``key`` is what attention was called with."""
        if self.table is None:
            return super().all_keys(key)
        assert self.start is not None
        entries = torch.arange(self.longest, device=self.keys.device) - self.start[..., None]
        return self.keys.view(-1, self.keys.shape[-1])[self._slots(self.table, entries.clamp(min=0))]

    def narrowed(self, kept: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """What attention is called with after everything but ``kept`` was evicted."""
        return super().narrowed(kept, key, value) if self.table is None else (key, value)

    def keep(self, indices: Tensor, trace: bool) -> None:
        """Evicts everything but the slots ``indices``, int64 [B, Hk, n], ascending, -1 first in shorter heads."""
        if self.kv_heads * self.heads.count == 1:
            super().keep(indices, trace)
            return
        self._record(indices, trace)
        row, head, column = (indices >= 0).nonzero(as_tuple=True)
        slot = indices[row, head, column]
        start = (indices < 0).sum(-1)
        self.longest = indices.shape[-1]
        pages = self._pages_for(self.longest - start)
        table, used = numbered(pages)
        target = self._slot(table, row, head, column - start[row, head])
        if self.table is None:
            keys, values = self.keys[row, head, slot], self.values[row, head, slot]
        else:
            assert self.start is not None
            origin = self._slot(self.table, row, head, slot - self.start[row, head])
            keys, values = self.keys.flatten(0, 1)[origin], self.values.flatten(0, 1)[origin]
        self.keys, self.values = self._pool(keys, target, used), self._pool(values, target, used)
        self.table, self.used, self.start = table, used, start
        self.headroom = int((pages * self.page - self.lengths()).min())
        self.excess = self.longest - int(self.row_lengths().max())
        self._close_eviction()

    def _join_entries(self, parts: Sequence[Self], stored: int) -> None:
        if all(part.table is None for part in parts):
            super()._join_entries(parts, stored)
            return
        used, tables, starts = 0, [], []
        for part in parts:
            if part.table is None:
                part._page_all()
            assert part.table is not None and part.start is not None
            tables.append(part.table.where(part.table < 0, part.table + used))
            starts.append(part.start + stored - part.longest)
            used += part.used
        self.keys = torch.cat([part.keys[: part.used] for part in parts])
        self.values = torch.cat([part.values[: part.used] for part in parts])
        most = max(table.shape[2] for table in tables)
        self.table = torch.cat([F.pad(table, (0, most - table.shape[2]), value=-1) for table in tables])
        self.start, self.longest, self.used = torch.cat(starts), stored, used
        self.headroom = min(part.headroom for part in parts)
        self.excess = self.longest - int(self.row_lengths().max())

    def _page_all(self) -> None:
        """Moves an unevicted layer into pages."""
        slots = torch.arange(self.physical_length(), device=self.keys.device)
        slots = slots.expand(self.keys.shape[0], self.kv_heads, -1)
        if self.start is not None:
            slots = slots.masked_fill(slots < self.start[:, None, None], -1)
        window = self.window
        self.keep(slots, trace=self.positions is not None)
        self.window = window

    def _pool(self, entries: Tensor, slots: Tensor, pages: int) -> Tensor:
        """A pool that holds ``entries`` [E, D] at ``slots`` and zeros elsewhere."""
        pool = entries.new_zeros(pages, self.page, entries.shape[-1])
        pool.view(-1, entries.shape[-1])[slots] = entries
        return pool

    def _pages_for(self, lengths: Tensor) -> Tensor:
        return (lengths + self.page - 1) // self.page

    def _slots(self, table: Tensor, entries: Tensor) -> Tensor:
        """Pool slots of the given entries of each row and head, int64 [B, Hk, n]."""
        return table.gather(2, entries // self.page) * self.page + entries % self.page

    def _slot(self, table: Tensor, row: Tensor, head: Tensor, entry: Tensor) -> Tensor:
        """Pool slots of single entries, int64 [E]."""
        return table[row, head, entry // self.page] * self.page + entry % self.page

    def _reserve(self, count: int) -> None:
        """Gives each row and head the pages that ``count`` more tokens need, and a page ahead: heads of different
        lengths cross into new pages at different steps, and each time the host would wait for the device."""
        assert self.table is not None
        held, lengths = (self.table >= 0).sum(-1), self.lengths()
        wanted = torch.maximum(held, self._pages_for(lengths + count + self.page - 1))
        needed = int((wanted - held).sum())
        spare = self.keys.shape[0] - self.used
        if needed > spare:
            growth = max(needed, held.numel()) - spare
            self.keys = F.pad(self.keys, (0, 0, 0, 0, 0, growth))
            self.values = F.pad(self.values, (0, 0, 0, 0, 0, growth))
        table = F.pad(self.table, (0, max(0, int(wanted.max()) - self.table.shape[2])), value=-1)
        rank = torch.arange(table.shape[2], device=table.device)
        fresh = (rank >= held[..., None]) & (rank < wanted[..., None])
        table[fresh] = torch.arange(self.used, self.used + needed, device=table.device)
        self.table, self.used = table, self.used + needed
        self.headroom = int((wanted * self.page - lengths).min())

    def _drop_newest(self, count: int) -> None:
        if self.table is None:
            super()._drop_newest(count)
        else:
            self.longest -= count
            self.headroom += count

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.table is None:
            super()._map_rows(change)
            return
        table = change(self.table).clone()
        owned = table >= 0
        source = table[owned]
        table[owned] = torch.arange(source.numel(), device=table.device)
        self.keys, self.values = self.keys[source], self.values[source]
        self.table, self.used = table, source.numel()
        self._map_tensors(change, (name for name in self.row_tensors if name not in ("keys", "values")))

    def select_rows(self, rows: Tensor, padding: int) -> None:
        """As in the base; ``start`` stays a tensor where there is a table."""
        super().select_rows(rows, padding)
        if self.table is not None:
            self.start = self.table.new_zeros(self.table.shape[:2]) if self.start is None else self.start
            self.excess = self.longest - int(self.row_lengths().max())

    def _drop_oldest(self, count: int) -> None:
        """Pages hold no empty slots; only their numbers change. ``start`` stays a tensor, there is a table."""
        if self.table is None:
            super()._drop_oldest(count)
            return
        assert self.start is not None
        self.start, self.longest = self.start - count, self.longest - count
        self.positions = None if self.positions is None else self.positions[..., count:]
        self.floor = max(0, self.floor - count)

    # The fixed form: every head owns all the pages that it will need, and the first of those it holds are filled.

    def allocate(self, spec: FixedSpec) -> FixedForm:
        """Empty buffers for the fixed form: ``shape.capacity`` is the entries per head, on average, that there will be
        place for, those to come among them."""
        if self.table is None:
            return super().allocate(spec)
        shape, page = spec.shape, self.page
        entries = shape.heads * shape.capacity
        pages = shape.rows * (-(-entries // page) + shape.heads)  # every head may leave a page half full
        pool = replace(shape, rows=pages, heads=1, capacity=page).buffers()
        longest = entries - shape.heads * spec.headroom + spec.headroom
        table = shape.numbers(shape.rows, shape.heads, -(-longest // page)).fill_(-1)
        tensors = {name: buffer[:, 0] for name, buffer in pool.items()}
        return FixedForm(tensors | {"table": table, "lengths": shape.numbers(shape.rows, shape.heads)}, spec)

    def _put(self, form: FixedForm) -> None:
        """The pages of each head move to the first of those that it has in the buffers."""
        if self.table is None:
            super()._put(form)
            return
        assert form.spec is not None
        tensors = form.tensors
        tensors["lengths"].copy_(self.lengths())
        table, _ = numbered(self._pages_for(tensors["lengths"] + form.spec.headroom))
        tensors["table"].fill_(-1)
        tensors["table"][..., : table.shape[2]] = table
        owner = (self.table >= 0).nonzero(as_tuple=True)
        source, target = self.table[owner], tensors["table"][owner]
        for name, entries in (("keys", self.keys), ("values", self.values)):  # each is copied on the way
            tensors[name][target] = entries[source]

    def _take_back(self, form: FixedForm) -> None:
        """Only pages that hold something move back."""
        if "table" not in form.tensors:
            super()._take_back(form)
            return
        lengths = form.tensors["lengths"]
        pages = self._pages_for(lengths)
        self.table, self.used = numbered(pages)
        filled = form.tensors["table"][..., : self.table.shape[2]][self.table >= 0]
        self.keys, self.values = form.tensors["keys"][filled], form.tensors["values"][filled]
        self.start = self.longest + form.steps - lengths
        self.headroom = int((pages * self.page - lengths).min())
        self._note_steps(form.steps)
        self.longest += form.steps

    def write(self, form: FixedForm, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Writes one new entry per head, [B, Hk, 1, D]; returns just these, :meth:`attend_fixed` reads the pool."""
        if "table" not in form.tensors:
            return super().write(form, key_states, value_states)
        lengths = form.tensors["lengths"]
        slot = self._slots(form.tensors["table"], lengths[..., None])[..., 0]
        for name, new in (("keys", key_states), ("values", value_states)):
            form.tensors[name].view(-1, new.shape[-1])[slot] = new[:, :, 0]
        lengths.add_(1)
        return key_states, value_states

    def attend_fixed(self, attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of one new query per row over the entries of each head alone, [B, 1, Hq, Dv]."""
        assert self.fixed is not None
        if "table" not in self.fixed.tensors:
            return super().attend_fixed(attention, query, key, value)
        pool = (self.fixed.tensors[name] for name in ("keys", "values", "table", "lengths"))
        return ragged_attention(query, *pool, **attention.softmax(query.shape[-1]))


def numbered(pages: Tensor) -> tuple[Tensor, int]:
    """A table that gives each row and head its number of ``pages``, int64 [B, Hk], in order, and how many there are."""
    owned = torch.arange(int(pages.max()), device=pages.device) < pages[..., None]
    total = int(owned.sum())
    table = torch.full(owned.shape, -1, dtype=torch.long, device=pages.device)
    table[owned] = torch.arange(total, device=pages.device)
    return table, total
