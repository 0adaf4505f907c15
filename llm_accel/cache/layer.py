"""The plain cache layer: entries are appended, attention sees all of them, and what is evicted is gone."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor

from llm_accel.cache.attention import Attention
from llm_accel.cache.fixed import GRANULE, FixedForm, FixedSpec, restoring
from llm_accel.cache.headroom import appended
from llm_accel.cache.store import EntryStore
from llm_accel.errors import UnsupportedCallError
from llm_accel.kernels.compaction import gather_entries
from llm_accel.kernels.ragged_decode import ragged_attention


class CallStage(Enum):
    """Where a layer stands in a call.

    IDLE: no entries are under way.
    AWAITED: a call with the plug-in has begun and its entries have not come yet.
    ARRIVED: they have, and our attention has not seen them yet.
    """

    IDLE = auto()
    AWAITED = auto()
    ARRIVED = auto()


@dataclass
class PendingReaders:
    """Entries that later layers attend to in the running call, before any of them is evicted.

    Attributes:
        key, value: what attention is called with, [B, H, P, D].
        left: how many layers have still to read.
        then: what is due after the last of them.
    """

    key: Tensor
    value: Tensor
    left: int
    then: Callable[[], None] | None


class AccelLayer(EntryStore):
    """An :class:`EntryStore` that takes part in the calls of a model.

    Attributes:
        stage: where it stands in the running call.
        missing: tokens of the running call that were taken out before they came here.
        arriving: original positions of the running call's entries, int64 [B, n], -1 for padding, where they are traced
            and tokens may be taken out; else None.
        given: keys and values as :meth:`update` returned them, until attention has seen them, else None.
        reading: what later layers of the running call read in these entries, else None.
        refused: whether a call without the plug-in was refused here; earlier layers may have taken its tokens in.
    """

    def _clear(self) -> None:
        super()._clear()
        self.stage = CallStage.IDLE
        self.missing = 0
        self.arriving: Tensor | None = None
        self.given: tuple[Tensor, Tensor] | None = None
        self.reading: PendingReaders | None = None
        self.refused = False

    def is_at(self, past: int) -> bool:
        """Whether ``past`` tokens have been seen, all of them by calls that came to their end."""
        whole = self.stage is not CallStage.ARRIVED and not self.refused
        return whole and self.cumulative_length + self.removed == past

    def await_entries(self) -> None:
        """A call has begun."""
        self.stage = CallStage.AWAITED
        self.missing, self.arriving = 0, None
        self.given = self.reading = None

    def pad(self, padding: Tensor, count: int) -> None:
        """Marks the leading padding of each row, int64 [B], after ``count`` new tokens of an incomplete prompt."""
        if not self.compressed:
            self.start, self.padding = padding.clone(), padding.clone()  # tensors saved to one file must not be shared

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Stores new entries [B, Hk, T, D] and returns what attention is called with, as :meth:`add` does; within a
        graph, as :meth:`write` does."""
        if self.fixed is not None and self.fixed.stepping:
            return self.write(self.fixed, key_states, value_states)
        self.unfix()
        self.given = self.add(key_states, value_states)
        return self.given

    def add(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Appends new entries [B, Hk, T, D] and returns all stored ones."""
        self._admit(key_states.shape[-2])
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.keys.numel() == 0:
            self.keys, self.values = key_states, value_states
        else:
            self.keys = appended(self.keys, key_states, self.ahead - 1)
            self.values = appended(self.values, value_states, self.ahead - 1)
        self.coming = max(0, self.coming - key_states.shape[-2])
        self._place(key_states.shape[-2])
        return self.keys, self.values

    def _admit(self, count: int) -> None:
        """Counts new tokens; refuses, before anything changes, those of a model without the plug-in, whose attention
        knows nothing of evicted entries."""
        if self.stage is CallStage.IDLE:
            self.refused = True
            raise UnsupportedCallError(
                "this cache was filled with the plug-in, and this call runs without it; apply the same method again, "
                "or start with a new cache."
            )
        if self.stage is CallStage.ARRIVED:
            raise UnsupportedCallError("an earlier call on this cache failed half-way; start with a new cache.")
        self.stage = CallStage.ARRIVED
        self.cumulative_length += count
        self.removed += self.missing

    def _place(self, count: int) -> None:
        """Notes where the newest ``count`` entries stood in the prompt, where that is traced."""
        if self.missing:
            self.floor = self.physical_length()
        if self.arriving is not None:
            newest = self.arriving[:, None].to(self.keys.device).expand(-1, self.kv_heads, -1)
            self.positions = newest if self.positions is None else torch.cat([self.positions, newest], dim=-1)
            self.kept = self.positions
        elif self.positions is not None:
            self.append_positions(count)

    def attend(self, attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Dense attention of the newest queries over what :meth:`update` returned, [B, T, Hq, Dv]."""
        return attention.dense(query, key, value, self.start)

    def after_readers(self, readers: int, key: Tensor, value: Tensor, then: Callable[[], None] | None) -> None:
        """Does ``then`` once ``readers`` later layers have attended to these entries too, at once where there are none.

        Args:
            key, value: what attention was called with, [B, H, P, D].
        """
        if readers:
            self.reading = PendingReaders(key, value, readers, then)
        else:
            self._finish_reading(then)

    def read_once(self) -> None:
        """One of the later layers has read."""
        assert self.reading is not None
        self.reading.left -= 1
        if not self.reading.left:
            self._finish_reading(self.reading.then)

    def _finish_reading(self, then: Callable[[], None] | None) -> None:
        self.given = self.reading = None
        if then is not None:
            then()

    def attend_again(self, attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of another layer's queries over the same entries, [B, T, Hq, Dv]."""
        return self.attend(attention, query, key, value)

    def turned_keys(self, rotary: Any, given: Tensor, arrived_at: Tensor | None) -> Tensor:
        """Keys as attention must see them; ``given`` unless positions are ranks in the cache."""
        return given

    def all_keys(self, key: Tensor) -> Tensor:
        """Keys of all entries as attention sees them; ``key`` is what attention was called with."""
        return key

    def narrowed(self, kept: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """What attention is called with after everything but ``kept`` was evicted: ``key`` and ``value`` cut to it."""
        return gather_entries(kept.repeat_interleave(key.shape[1] // kept.shape[1], dim=1), key, value)[:2]

    def observe(self, query: Tensor, width: int) -> None:
        """Remembers the last ``width`` queries of an incomplete prompt, in memory of their own."""
        recent = query[:, :, -width:]
        if self.window is not None and recent.shape[2] < width:
            recent = torch.cat([self.window, recent], dim=2)[:, :, -width:]
        self.window = recent.clone(memory_format=torch.contiguous_format)

    def keep(self, indices: Tensor, trace: bool) -> None:
        """Evicts everything but the slots ``indices``, int64 [B, Hk, n], ascending, -1 first in shorter rows."""
        self._record(indices, trace)
        self._gather(indices)
        self.start = None if self.start is None else (indices[:, 0] < 0).sum(-1)
        self._close_eviction()

    def _gather(self, indices: Tensor) -> None:
        """Copies the slots ``indices`` into storage of their own."""
        self.keys, self.values, _ = gather_entries(indices, self.keys, self.values)

    def _record(self, indices: Tensor, trace: bool) -> None:
        """Remembers the original positions of what is about to be kept."""
        if trace:
            self.positions = self._positions_of(indices)
            self.kept = self.positions

    def _close_eviction(self) -> None:
        self.compressed = True
        self.floor = self.physical_length()
        self.window = None

    # The fixed form: keys and values [B, Hk, C, D]; row ``b`` holds its entries in slots ``0..lengths[b]-1``, oldest
    # first.

    def allocate(self, spec: FixedSpec) -> FixedForm:
        """Empty buffers for the fixed form."""
        tensors = spec.shape.buffers() | {"lengths": spec.shape.numbers(spec.shape.rows)}
        if spec.kernel:  # the same slots as pages of the ragged kernel, int64 [B, Hk, C / 64]
            size = (spec.shape.rows, spec.shape.heads, spec.shape.capacity // GRANULE)
            pages = torch.arange(size[0] * size[1] * size[2], device=spec.shape.device)
            tensors["pages"] = pages.view(size)
        return FixedForm(tensors, spec)

    def fix(self, form: FixedForm) -> None:
        """Puts the entries into the buffers of ``form``; nothing else holds them from then on."""
        form.held, form.steps, form.stepping = self.physical_length(), 0, False
        self._put(form)
        self.fixed = form
        self._let_go()

    def _put(self, form: FixedForm) -> None:
        """Rows move to the left, past their padding."""
        count, start = form.held, self.start
        for name, held in (("keys", self.keys), ("values", self.values)):
            if start is not None:
                slots = torch.arange(count, device=held.device) + start[:, None]
                held = _of_rows(held, slots.clamp(max=count - 1))
            form.tensors[name][:, :, :count] = held
        form.tensors["lengths"].fill_(count)
        if start is not None:
            form.tensors["lengths"].sub_(start)

    def _let_go(self) -> None:
        self.keys = self.values = None  # type: ignore[assignment]

    def _take_back(self, form: FixedForm) -> None:
        """Rows move back to the right."""
        count = form.held + form.steps
        for name in ("keys", "values"):
            held = form.tensors[name][:, :, :count]
            if self.start is None:
                held = held.clone(memory_format=torch.contiguous_format)
            else:
                slots = torch.arange(count, device=held.device) - self.start[:, None]
                held = _of_rows(held, slots.clamp(min=0))
            setattr(self, name, held)
        self._note_steps(form.steps)

    def _note_steps(self, steps: int) -> None:
        if self.positions is not None and steps:
            self.append_positions(steps)

    def write(self, form: FixedForm, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Writes one new entry per row, [B, Hk, 1, D]; returns the buffers."""
        keys, values, lengths = (form.tensors[name] for name in ("keys", "values", "lengths"))
        slot = lengths[:, None, None, None]
        keys.scatter_(2, slot.expand(key_states.shape), key_states)
        values.scatter_(2, slot.expand(value_states.shape), value_states)
        lengths.add_(1)
        return keys, values

    def attend_fixed(self, attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of one new query per row over what :meth:`write` returned, [B, 1, Hq, Dv]: over the entries of each
        row alone where there is a kernel for it, else over the buffers under a mask."""
        assert self.fixed is not None
        tensors, pages = self.fixed.tensors, self.fixed.tensors.get("pages")
        if pages is None:
            slots = torch.arange(key.shape[2], device=key.device)
            visible = slots[None, None, None] < tensors["lengths"][:, None, None, None]
            return attention.visible(query, key, value, visible)
        keys, values = (tensors[name].view(-1, GRANULE, tensors[name].shape[-1]) for name in ("keys", "values"))
        lengths = tensors["lengths"][:, None].expand(pages.shape[:2])
        return ragged_attention(query, keys, values, pages, lengths, **attention.softmax(query.shape[-1]))

    def begin_step(self) -> Hashable:
        """A step begins. Returns what is constant in it and may not be so in every step; each value of it is a graph of
        its own."""
        assert self.fixed is not None
        self.fixed.stepping = True
        return None

    def end_step(self) -> None:
        """The graph has added one token."""
        assert self.fixed is not None
        self.fixed.steps += 1
        self.fixed.stepping = False
        self.cumulative_length += 1
        self.stage = CallStage.IDLE

    def backup(self) -> Callable[[], None]:
        """Call the result to undo a step that failed half-way. Entries that no step overwrites are not copied."""
        assert self.fixed is not None
        return restoring(self.fixed.beside_entries())


def _of_rows(entries: Tensor, slots: Tensor) -> Tensor:
    """The slots of each row, int64 [B, n], of [B, H, C, D] in every head."""
    index = slots[:, None, :, None].expand(-1, entries.shape[1], -1, entries.shape[-1])
    return entries.gather(2, index)
