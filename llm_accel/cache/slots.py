"""Slots that are overwritten in place: the size never changes once the budget is reached."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_accel.cache.attention import Attention
from llm_accel.cache.autograd_modes import writable
from llm_accel.cache.fixed import FixedForm, FixedSpec, together
from llm_accel.cache.layer import AccelLayer
from llm_accel.cache.store import held
from llm_accel.errors import UnsupportedCallError
from llm_accel.kernels.compaction import gather_entries
from llm_accel.kernels.slot_write import slot_write


class SlotLayer(AccelLayer):
    """Grows like :class:`AccelLayer` up to ``capacity``; from then on each new token overwrites one slot per KV head.
    Rotary phases are baked into the keys, so the order of the slots means nothing while decoding.

    Attributes:
        capacity: slots at which overwriting begins; None while the prompt is incomplete or nothing is ever evicted.
        empty_slots: slots beyond the budget that are allocated empty, for methods that see budget + 1 entries.
        scores: attention that each entry has received, fp32 [B, Hk, P], for methods that rank by it, else None.
        spare: slot that the next token overwrites, int64 [B, Hk]; None while the layer still grows.
        vacant: upper bound of empty slots in any row, so that ``start`` can be dropped without a synchronisation.
    """

    row_tensors = (*AccelLayer.row_tensors, "scores", "spare")
    plain_values = (*AccelLayer.plain_values, "capacity", "vacant")
    slotted: ClassVar = AccelLayer.slotted | {"scores": (-1, 0)}
    per_slot = (*AccelLayer.per_slot, "scores")
    start: Tensor | None = held("start")
    scores: Tensor | None = held("scores")
    spare: Tensor | None = held("spare")

    def __init__(self, empty_slots: int = 0) -> None:
        self.empty_slots = empty_slots
        super().__init__()

    def _clear(self) -> None:
        super()._clear()
        self.capacity: int | None = None
        self.scores = self.spare = None
        self.vacant = 0

    def add(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Overwrites the spare slot with one new token, or appends where the layer still grows or a turn begins."""
        count = key_states.shape[-2]
        if count == 1 and self.spare is not None:
            self._overwrite(self.spare, key_states, value_states)
            return self.keys, self.values
        if self.spare is not None:
            self._restore_order()
        super().add(key_states, value_states)
        if self.scores is not None:
            self.scores = F.pad(self.scores, (0, count))
        return self.keys, self.values

    def _overwrite(self, spare: Tensor, key_states: Tensor, value_states: Tensor) -> None:
        assert self.positions is not None
        self._admit(1)
        self.keys, self.values = writable(self.keys, key_states), writable(self.values, value_states)
        self.positions, self.scores = slot_write(
            self.keys, self.values, key_states, value_states, spare, self.positions, self.scores
        )
        if self.start is not None:
            self.vacant -= 1
            self.start = (self.start - 1).clamp(min=0) if self.vacant > 0 else None

    def accumulate(self, votes: Tensor, decay: float) -> None:
        """Adds the attention of one call, fp32 [B, Hk, P], to the scores."""
        self.scores = votes if self.scores is None else self.scores * decay + votes

    def bound(self, capacity: int | None) -> None:
        """Sets where overwriting begins; called when a prompt is complete."""
        self.capacity = capacity
        self.count_positions()

    def count_positions(self) -> None:
        """Gives each slot of an unevicted prompt its original position."""
        if self.positions is None:
            self.positions = self._slot_positions()

    def choose_spare(self, victims: Tensor | None) -> None:
        """Decides what the next token overwrites: an empty slot of the row if it has one, else ``victims`` [B, Hk]."""
        if victims is None:
            self.spare = None
            return
        if self.start is None:
            self.spare = victims
            return
        if self.spare is None:
            self.vacant = int(self.start.max())
        empty = (self.start - 1)[:, None].expand_as(victims)
        self.spare = torch.where(empty >= 0, empty, victims)

    @property
    def ahead(self) -> int:
        """How many more slots they may need: none beyond the capacity."""
        return self.coming if self.capacity is None else min(self.coming, self.capacity - self.physical_length())

    @property
    def full(self) -> bool:
        """Whether every further token must overwrite a slot."""
        return self.capacity is not None and self.physical_length() >= self.capacity

    def seen_positions(self) -> Tensor:
        """Original position of each slot, int64 [B, Hk, P]; -1 where it is empty."""
        assert self.positions is not None
        if self.start is None:
            return self.positions
        empty = torch.arange(self.physical_length(), device=self.keys.device) < self.start[:, None, None]
        return self.positions.masked_fill(empty, -1)

    def keep(self, indices: Tensor, trace: bool) -> None:
        """Evicts everything but ``indices`` and allocates the empty_slots on the left."""
        indices = F.pad(indices, (self.empty_slots, 0), value=-1)
        if self.empty_slots and self.start is None:
            self.start = torch.zeros(indices.shape[0], dtype=torch.long, device=indices.device)
        super().keep(indices, trace=True)
        self.kept = None
        self.spare = None

    def _gather(self, indices: Tensor) -> None:
        self.keys, self.values, self.scores = gather_entries(indices, self.keys, self.values, self.scores)

    def kept_positions(self) -> Tensor | None:
        """Original positions of the entries that the next token still finds, int64 [B, Hk, n], ascending."""
        if self.positions is None:
            return None
        positions = self.seen_positions()
        if self.empty_slots and self.spare is not None:
            positions = positions.scatter(2, self.spare[..., None], -1)
        ordered = positions.sort(-1).values
        return ordered[..., min(int((ordered < 0).sum(-1).min()), ordered.shape[-1]) :]

    def _restore_order(self) -> None:
        """Oldest first again, so that several tokens can be appended; an evicted spare becomes an empty slot."""
        assert self.positions is not None and self.spare is not None
        positions = self.seen_positions()
        if self.empty_slots:
            positions = positions.scatter(2, self.spare[..., None], -1)
        order = positions.argsort(stable=True, dim=-1)
        self.positions = positions.gather(2, order)
        self._gather(order)
        if self.start is not None or self.empty_slots:
            self.start = (self.positions[:, 0] < 0).sum(-1)
        self.spare = None

    def _drop_oldest(self, count: int) -> None:
        """Nothing where slots are overwritten: how many there are is what says so."""
        if not self.full:
            super()._drop_oldest(count)

    def crop(self, tokens_to_remove: int) -> None:
        """Refused once slots are overwritten or scores were added: what the removed tokens did cannot be undone."""
        if self.compressed or self.spare is not None or self.scores is not None:
            raise UnsupportedCallError("this cache overwrites its slots and cannot be cropped; start with a new cache.")
        super().crop(tokens_to_remove)

    # The fixed form: all slots are there from the first step on, those that no row has grown into yet empty on the
    # left, so that growing and overwriting are one operation.

    def allocate(self, spec: FixedSpec) -> FixedForm:
        """Empty buffers for the fixed form."""
        shape, size = spec.shape, (spec.shape.rows, spec.shape.heads)
        tensors = shape.buffers() | {
            "start": shape.numbers(shape.rows),
            "positions": shape.numbers(*size, shape.capacity),
            "spare": shape.numbers(*size),
        }
        assert spec.step is not None
        if spec.step.accumulates:
            tensors["scores"] = torch.zeros(*size, shape.capacity, device=shape.device)
        return FixedForm(tensors, spec)

    def _put(self, form: FixedForm) -> None:
        """Entries move to the right end."""
        self.count_positions()
        tensors = form.tensors
        empty = tensors["keys"].shape[2] - form.held
        tensors["keys"][:, :, empty:], tensors["values"][:, :, empty:] = self.keys, self.values
        tensors["positions"].copy_(F.pad(self.seen_positions(), (empty, 0), value=-1))
        if "scores" in tensors and self.scores is not None:
            tensors["scores"].copy_(F.pad(self.scores, (empty, 0)))
        tensors["start"].fill_(empty)
        if self.start is not None:
            tensors["start"].add_(self.start)
        tensors["spare"].copy_((tensors["start"] - 1)[:, None] if self.spare is None else self.spare)

    def _let_go(self) -> None:
        super()._let_go()
        self.positions = self.scores = self.spare = self.start = None

    def _take_back(self, form: FixedForm) -> None:
        """Slots that no row has grown into are left out; as long as there are any, the entries are in order."""
        tensors = form.tensors
        positions, start = tensors["positions"], tensors["start"]
        empty, most = int(start.min()), int(start.max())
        count = positions.shape[2] - empty
        self.start = start - empty if most > empty else None
        self.vacant = most - empty
        names = ("keys", "values", "positions", "scores")
        if count == self.capacity:
            for name in (*names, "spare"):
                setattr(self, name, tensors[name].clone() if name in tensors else None)
            return
        order = positions.argsort(stable=True, dim=-1)[..., empty:]
        for name in names:
            held = tensors.get(name)
            if held is not None:
                index = order if held.ndim == 3 else order[..., None].expand(-1, -1, -1, held.shape[-1])
                held = held.gather(2, index)
            setattr(self, name, held)
        self.spare = None

    def write(self, form: FixedForm, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Puts one new entry per head, [B, Hk, 1, D], into the spare slot; returns the buffers."""
        tensors = form.tensors
        slot, positions, scores = tensors["spare"][..., None], tensors["positions"], tensors.get("scores")
        positions.scatter_(2, slot, positions.amax(-1, keepdim=True) + 1)
        if scores is not None:
            scores.scatter_(2, slot, 0.0)
        tensors["keys"].scatter_(2, slot[..., None].expand(key_states.shape), key_states)
        tensors["values"].scatter_(2, slot[..., None].expand(value_states.shape), value_states)
        tensors["start"].copy_((tensors["start"] - 1).clamp(min=0))
        return tensors["keys"], tensors["values"]

    def attend_fixed(self, attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention over all slots that are not empty, [B, 1, Hq, Dv]; then chooses what the next token takes."""
        assert self.fixed is not None and self.fixed.spec is not None and self.fixed.spec.step is not None
        tensors, step = self.fixed.tensors, self.fixed.spec.step
        start, scores = tensors["start"], tensors.get("scores")
        output, received, victims = step(attention, query, key, value, start, tensors["positions"], scores)
        if scores is not None and received is not None:
            scores.copy_(received)
        empty = (start - 1)[:, None].expand_as(victims)
        tensors["spare"].copy_(torch.where(empty >= 0, empty, victims))
        return output

    def backup(self) -> Callable[[], None]:
        """Call the result to undo a step that failed half-way: the entries that it overwrites are kept."""
        assert self.fixed is not None
        tensors = self.fixed.tensors
        slot = tensors["spare"][..., None, None].clone()
        index = {name: slot.expand(-1, -1, 1, tensors[name].shape[-1]) for name in ("keys", "values")}
        before = {name: tensors[name].gather(2, index[name]) for name in index}

        def write_back() -> None:
            for name, content in before.items():
                tensors[name].scatter_(2, index[name], content)

        return together([super().backup(), write_back])
