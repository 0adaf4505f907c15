"""The plain cache layer: logical length (what transformers reads) apart from physical length (what is stored)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from llm_accel.cache.attention import Attention
from llm_accel.cache.autograd_modes import thawed
from llm_accel.cache.headroom import appended
from llm_accel.cache.joining import joined, leading
from llm_accel.cache.lending import Lendable
from llm_accel.errors import UnsupportedCallError
from llm_accel.kernels.compaction import gather_entries
from llm_accel.patches.rotary import Rotary


@dataclass
class Reading:
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


class AccelLayer(DynamicLayer, Lendable):
    """Keys and values of one full-attention layer, [B, Hk, P, D], right-aligned: row ``b`` holds real entries in
    slots ``start[b]..P-1``, oldest first, so that padded rows and shorter rows need no mask and appending is uniform.

    Attributes:
        cumulative_length: tokens that came here; the name that ``CacheLayerMixin.reset`` clears.
        removed: tokens of the prompt that were taken out before they came here; they count in the logical length.
        missing: those of the running call, until its entries come.
        arriving: original positions of the running call's entries, int64 [B, n], -1 for padding, where they are traced
            and tokens may be taken out; else None.
        start: first real slot of each row, int64 [B]; None when every slot is real.
        padding: leading padding tokens of each row, int64 [B], which are counted in the logical length; None: none.
        expected: whether a call with the plug-in has begun and its entries have not come yet.
        given: keys and values as :meth:`update` returned them, until attention has seen them, else None.
        attended: whether our attention has seen the newest entries; False while they are on their way to it.
        reading: what later layers of the running call read in these entries, else None.
        pictured: whether a prompt with visual tokens came here or was taken out on its way.
        compressed: whether entries were evicted since the last reset.
        floor: physical length right after the last eviction; rolling back below it is impossible.
        window: last observed queries [B, Hq, <=W, D] while the prompt is incomplete, else None.
        positions: original position of each slot, int64 [B, Hk, P], when traced and compressed, else None.
        kept: ``positions`` right after the last eviction.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True
    keys: Tensor  # None only before the first update
    values: Tensor
    row_tensors: ClassVar[tuple[str, ...]] = ("keys", "values", "start", "padding", "window", "positions", "kept")
    shared_tensors: ClassVar[tuple[str, ...]] = ()
    plain_values: ClassVar[tuple[str, ...]] = ("cumulative_length", "removed", "pictured", "compressed", "floor")
    # what lies beside the slots: the dimension of the slots and what stands where a row has none
    slotted: ClassVar[dict[str, tuple[int, int]]] = {"window": (-2, 0), "positions": (-1, -1), "kept": (-1, -1)}

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._clear()

    def _clear(self) -> None:
        self.cumulative_length = 0
        self.removed = 0
        self.missing = 0
        self.arriving: Tensor | None = None
        self.start: Tensor | None = None
        self.padding: Tensor | None = None
        self.expected = False
        self.given: tuple[Tensor, Tensor] | None = None
        self.attended = True
        self.reading: Reading | None = None
        self.pictured = False
        self.compressed = False
        self.floor = 0
        self.window: Tensor | None = None
        self.positions: Tensor | None = None
        self.kept: Tensor | None = None
        self.lease = None

    def get_seq_length(self) -> int:
        """Logical length: tokens seen by the model, the only length that transformers may read."""
        return self.cumulative_length + self.removed

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(0, 0): the sentinel that makes our mask function return None; validity lives in this layer."""
        return 0, 0

    def physical_length(self) -> int:
        """Slots stored."""
        return self.keys.shape[-2] if self.is_initialized and self.keys.numel() else 0

    def mean_length(self) -> int:
        """Slots stored per KV head, averaged where heads store different numbers."""
        return self.physical_length()

    def row_lengths(self) -> Tensor:
        """Real entries of each row, per KV head on average and rounded up, int64 [B]; [1] where all rows are alike."""
        lengths = torch.full((1,), self.physical_length(), device=self.keys.device)
        return lengths if self.start is None else lengths - self.start

    def seen(self) -> Tensor | None:
        """Tokens that each row has seen, int64 [B], [1] where all rows are alike; None until some are evicted."""
        if not self.compressed:
            return None
        seen = torch.full((1,), self.cumulative_length, device=self.keys.device)
        return seen if self.padding is None else seen - self.padding

    @property
    def rows(self) -> int:
        """Rows that are stored."""
        return self.keys.shape[0]

    @property
    def kv_heads(self) -> int:
        """KV heads that are stored."""
        return self.keys.shape[1]

    def token_bytes(self) -> int:
        """Bytes that one token takes in all rows and heads."""
        return (self.keys.nbytes + self.values.nbytes) // self.physical_length()

    def nbytes(self) -> int:
        """Bytes of the storage behind keys and values, views included."""
        if not self.physical_length():
            return 0
        return int(self.keys.untyped_storage().nbytes() + self.values.untyped_storage().nbytes())

    def thaw(self) -> None:
        """Makes tensors of a call in inference mode usable in a call outside of it."""
        held = self.__dict__
        for name, content in held.items():
            if isinstance(content, Tensor) and content.is_inference():
                held[name] = thawed(content)

    def pad(self, padding: Tensor, count: int) -> None:
        """Marks the leading padding of each row, int64 [B], after ``count`` new tokens of an incomplete prompt."""
        if not self.compressed:
            self.start, self.padding = padding.clone(), padding.clone()  # tensors saved to one file must not be shared

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Stores new entries [B, Hk, T, D] and returns what attention is called with, as :meth:`add` does."""
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
            self.keys = appended(self.keys, key_states)
            self.values = appended(self.values, value_states)
        self._place(key_states.shape[-2])
        return self.keys, self.values

    def _admit(self, count: int) -> None:
        """Counts new tokens; refuses, before anything changes, those of a model without the plug-in, whose attention
        knows nothing of evicted entries."""
        if not self.expected:
            raise UnsupportedCallError(
                "this cache was filled with the plug-in, and this call runs without it; apply the same method again, "
                "or start with a new cache."
            )
        if not self.attended:
            raise UnsupportedCallError("an earlier call on this cache failed half-way; start with a new cache.")
        self.expected = self.attended = False
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

    def append_positions(self, count: int) -> None:
        """Notes the original positions of ``count`` decoded entries."""
        assert self.positions is not None
        steps = torch.arange(1, count + 1, device=self.positions.device)
        newest = self.positions[..., -1:] + steps
        self.positions = torch.cat([self.positions, newest], dim=-1)

    def attend(self, attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Dense attention of the newest queries over what :meth:`update` returned, [B, T, Hq, Dv]."""
        return attention.dense(query, key, value, self.start)

    def after_readers(self, readers: int, key: Tensor, value: Tensor, then: Callable[[], None] | None) -> None:
        """Does ``then`` once ``readers`` later layers have attended to these entries too, at once where there are none.

        Args:
            key, value: what attention was called with, [B, H, P, D].
        """
        if readers:
            self.reading = Reading(key, value, readers, then)
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

    def turned_keys(self, rotary: Rotary | None, given: Tensor, arrived_at: Tensor | None) -> Tensor:
        """Keys as attention must see them; ``given`` unless positions are ranks in the cache."""
        return given

    def all_keys(self, key: Tensor) -> Tensor:
        """Keys of all entries as attention sees them; ``key`` is what attention was called with."""
        return key

    def narrowed(self, kept: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """What attention is called with after everything but ``kept`` was evicted: ``key`` and ``value`` cut to it."""
        return gather_entries(kept.repeat_interleave(key.shape[1] // kept.shape[1], dim=1), key, value)[:2]

    def kept_positions(self) -> Tensor | None:
        """Original positions of the entries kept at the last eviction, int64 [B, Hk, n], or None."""
        return self.kept

    def observe(self, query: Tensor, width: int) -> None:
        """Remembers the last ``width`` queries of an incomplete prompt, in memory of their own."""
        recent = query[:, :, -width:]
        if self.window is not None and recent.shape[2] < width:
            recent = torch.cat([self.window, recent], dim=2)[:, :, -width:]
        self.window = recent.clone(memory_format=torch.contiguous_format)

    def own_storage(self) -> None:
        """Copies keys or values that are views into a larger tensor, so that they do not keep it alive."""
        if self.keys.untyped_storage().nbytes() > self.keys.nbytes:
            self.keys = self.keys.clone(memory_format=torch.contiguous_format)
        if self.values.untyped_storage().nbytes() > self.values.nbytes:
            self.values = self.values.clone(memory_format=torch.contiguous_format)

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

    def _positions_of(self, indices: Tensor) -> Tensor:
        if self.positions is not None:
            return self.positions.gather(2, indices.clamp(min=0)).masked_fill(indices < 0, -1)
        offset = 0 if self.start is None else self.start[:, None, None]
        return (indices - offset).masked_fill(indices < 0, -1)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest ``-tokens_to_remove`` tokens; refuses to go back past an eviction."""
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        remaining = self.physical_length() + tokens_to_remove
        if tokens_to_remove > 0 or remaining < self.floor:
            most = self.physical_length() - self.floor
            limit = f", at most {most} of them: older entries were evicted" if self.floor else ""
            raise UnsupportedCallError(
                f"cannot crop the cache by {tokens_to_remove}: give a negative number of tokens{limit}."
            )
        self._drop_newest(-tokens_to_remove)
        self.cumulative_length += tokens_to_remove
        if self.positions is not None:
            self.positions = self.positions[..., :tokens_to_remove]
        if self.window is not None:
            self.window = self.window[:, :, :tokens_to_remove]

    def _drop_newest(self, count: int) -> None:
        super().crop(-count)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders rows, for beam search."""
        self._map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row ``repeats`` times."""
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps only the given rows."""
        self._map_rows(lambda rows: rows[indices.to(rows.device)])

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        if not self.physical_length():
            return
        self._map_tensors(change, self.row_tensors)

    def _map_tensors(self, change: Callable[[Tensor], Tensor], names: Iterable[str]) -> None:
        for name in names:
            rows = getattr(self, name)
            if rows is not None:
                setattr(self, name, change(rows))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything the layer holds: tensors and plain values, by attribute name."""
        tensors = {name: getattr(self, name) for name in (*self.row_tensors, *self.shared_tensors)}
        plain = {name: getattr(self, name) for name in self.plain_values}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}, plain

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Fills an empty layer with what :meth:`state` gave."""
        if tensors:
            self.lazy_initialization(tensors["keys"], tensors["values"])
        for name, content in (tensors | values).items():
            setattr(self, name, content)

    def join(self, parts: Sequence[Self], length: int) -> None:
        """Fills an empty layer with the rows of ``parts``, whose prompts are complete, as if they had been read in one
        call that pads them on the left to ``length`` tokens."""
        self.lazy_initialization(parts[0].keys, parts[0].values)
        stored, device = max(part.physical_length() for part in parts), self.device
        traced = any(part.positions is not None for part in parts)
        for part in parts:
            if traced and part.positions is None:
                part.positions = part._slot_positions()
            if part.kept is None and any(other.kept is not None for other in parts):
                part.kept = part.positions
        self._join_entries(parts, stored)
        for name, (dim, empty) in self.slotted.items():
            setattr(self, name, joined([getattr(part, name) for part in parts], dim, empty))
        self.padding = leading([length - part.cumulative_length for part in parts], parts, "padding", device)
        self.compressed = any(part.compressed for part in parts)
        self.cumulative_length = length
        self.floor = self.physical_length() if self.compressed else 0

    def _join_entries(self, parts: Sequence[Self], stored: int) -> None:
        """The part of :meth:`join` that depends on how entries are stored; ``stored``: slots of the longest part."""
        for name in ("keys", "values"):
            setattr(self, name, joined([getattr(part, name) for part in parts], -2, 0))
        self.start = leading([stored - part.physical_length() for part in parts], parts, "start", self.device)

    def _slot_positions(self) -> Tensor:
        """Original position of each slot of an unevicted prompt, int64 [B, Hk, P], -1 for padding."""
        slots = torch.arange(self.physical_length(), device=self.keys.device)
        return self._positions_of(slots.expand(*self.keys.shape[:2], -1)).clamp(min=-1)

    def reset(self) -> None:
        """Forgets everything; the layer can be filled again."""
        self.keys = self.values = None  # type: ignore[assignment]
        self.is_initialized = False
        self._clear()
