"""Entries of one full-attention layer: what is stored, appended, cut off, and moved from row to row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from llm_accel.cache.autograd_modes import thawed
from llm_accel.cache.fixed import FixedForm, FixedSpec
from llm_accel.cache.headroom import gathered, selected
from llm_accel.cache.joining import joined, leading, lessened
from llm_accel.errors import UnsupportedCallError


def held(name: str) -> Any:
    """An attribute whose content lies in the buffers of the fixed form, if a store is in it: reading ends that."""
    own = f"_{name}"

    def read(store: EntryStore) -> Any:
        store.unfix()
        return getattr(store, own)

    def write(store: EntryStore, content: Any) -> None:
        setattr(store, own, content)

    return property(read, write)


class EntryStore(DynamicLayer):
    """Keys and values of one layer, [B, Hk, P, D], right-aligned: row ``b`` holds real entries in slots
    ``start[b]..P-1``, oldest first, so that padded rows and shorter rows need no mask and appending is uniform.

    Between compiled decode steps a store is in its fixed form: the entries lie in buffers of a capacity that does not
    change, with their lengths in tensors. :meth:`unfix` ends that; whatever reads or changes entries begins with it.

    Attributes:
        cumulative_length: tokens that came here; the name that ``CacheLayerMixin.reset`` clears.
        removed: tokens of the prompt that were taken out before they came here; they count in the logical length.
        start: first real slot of each row, int64 [B]; None when every slot is real.
        padding: leading padding tokens of each row, int64 [B], which are counted in the logical length; None: none.
        pictured: whether a prompt with visual tokens came here or was taken out on its way.
        factors: what the output of each query head is multiplied by, fp32 [B, Hq]; None: nothing is.
        compressed: whether entries were evicted since the last reset.
        floor: physical length right after the last eviction; rolling back below it is impossible.
        window: last observed queries [B, Hq, <=W, D] while the prompt is incomplete, else None.
        positions: original position of each slot, int64 [B, Hk, P], when traced and compressed, else None.
        kept: ``positions`` right after the last eviction.
        fixed: the fixed form, else None.
        coming: tokens that will be added at most, where that was announced, else 0.
    """

    is_sliding = False
    is_compileable = False  # transformers would build masks for it, and ours would take them for unusual ones
    is_croppable = True
    row_tensors: ClassVar[tuple[str, ...]] = (
        "keys",
        "values",
        "start",
        "padding",
        "window",
        "positions",
        "kept",
        "factors",
    )
    shared_tensors: ClassVar[tuple[str, ...]] = ()
    plain_values: ClassVar[tuple[str, ...]] = ("cumulative_length", "removed", "pictured", "compressed", "floor")
    # what lies beside the slots: the dimension of the slots and what stands where a row has none
    slotted: ClassVar[dict[str, tuple[int, int]]] = {"window": (-2, 0), "positions": (-1, -1), "kept": (-1, -1)}
    per_slot: ClassVar[tuple[str, ...]] = ("positions",)  # beside keys and values, slots in the last dimension
    fixed: FixedForm | None = None
    keys: Tensor = held("keys")  # None only before the first update
    values: Tensor = held("values")
    positions: Tensor | None = held("positions")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._clear()

    def _clear(self) -> None:
        self.cumulative_length = 0
        self.removed = 0
        self.start: Tensor | None = None
        self.padding: Tensor | None = None
        self.pictured = False
        self.factors: Tensor | None = None
        self.compressed = False
        self.floor = 0
        self.window: Tensor | None = None
        self.positions = None
        self.kept: Tensor | None = None
        self.fixed = None
        self.coming = 0

    def __getstate__(self) -> dict[str, Any]:
        self.unfix()
        return self.__dict__

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
        spec = None if self.fixed is None else self.fixed.spec
        return self.keys.shape[0] if spec is None else spec.shape.rows

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

    def own_storage(self) -> None:
        """Copies keys or values that are views into a larger tensor, so that they do not keep it alive."""
        if self.keys.untyped_storage().nbytes() > self.keys.nbytes:
            self.keys = self.keys.clone(memory_format=torch.contiguous_format)
        if self.values.untyped_storage().nbytes() > self.values.nbytes:
            self.values = self.values.clone(memory_format=torch.contiguous_format)

    def thaw(self) -> None:
        """Makes tensors of a call in inference mode usable in a call outside of it."""
        held = self.__dict__
        for name, content in held.items():
            if isinstance(content, Tensor) and content.is_inference():
                held[name] = thawed(content)

    def allocate(self, spec: FixedSpec) -> FixedForm:
        """Empty buffers for the fixed form."""
        raise NotImplementedError

    def unfix(self) -> None:
        """Ends the fixed form, if the store is in it: the entries get storage of their own again. Where there is no
        memory for that, the store stays in its fixed form."""
        if self.fixed is None:
            return
        form, self.fixed = self.fixed, None
        try:
            self._take_back(form)
        except BaseException:
            self.fixed = form
            raise
        self.thaw()  # steps do not look at what lies beside the entries

    def _take_back(self, form: FixedForm) -> None:
        raise NotImplementedError

    @property
    def is_fixed(self) -> bool:
        """Whether the store is in its fixed form."""
        return self.fixed is not None

    def append_positions(self, count: int) -> None:
        """Notes the original positions of ``count`` decoded entries."""
        assert self.positions is not None
        steps = torch.arange(1, count + 1, device=self.positions.device)
        newest = self.positions[..., -1:] + steps
        self.positions = torch.cat([self.positions, newest], dim=-1)

    def kept_positions(self) -> Tensor | None:
        """Original positions of the entries kept at the last eviction, int64 [B, Hk, n], or None."""
        return self.kept

    def _positions_of(self, indices: Tensor) -> Tensor:
        if self.positions is not None:
            return self.positions.gather(2, indices.clamp(min=0)).masked_fill(indices < 0, -1)
        offset = 0 if self.start is None else self.start[:, None, None]
        return (indices - offset).masked_fill(indices < 0, -1)

    def _slot_positions(self) -> Tensor:
        """Original position of each slot of an unevicted prompt, int64 [B, Hk, P], -1 for padding."""
        slots = torch.arange(self.physical_length(), device=self.keys.device)
        return self._positions_of(slots.expand(*self.keys.shape[:2], -1)).clamp(min=-1)

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
        if self.physical_length():
            self._map_tensors(change, self.row_tensors)

    def _map_tensors(self, change: Callable[[Tensor], Tensor], names: Iterable[str]) -> None:
        for name in names:
            rows = getattr(self, name)
            if rows is not None:
                setattr(self, name, change(rows))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything the layer holds: tensors and plain values, by attribute name."""
        self.unfix()
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
        self.expect(max(part.coming for part in parts))
        for name in ("keys", "values"):
            setattr(self, name, gathered([getattr(part, name) for part in parts], self.ahead))
        self.start = leading([stored - part.physical_length() for part in parts], parts, "start", self.device)

    def expect(self, tokens: int) -> None:
        """So many tokens will be added at most before rows come or leave."""
        self.coming = tokens

    @property
    def ahead(self) -> int:
        """How many more slots they may need."""
        return self.coming

    def select_rows(self, rows: Tensor, padding: int) -> None:
        """Keeps ``rows``, int64 [n], and lets go of what only others had: leading slots that are empty in those that
        stay, and ``padding`` leading tokens that are padding in them."""
        empty = 0 if self.start is None else int(self.start[rows.to(self.start.device)].min())
        if empty:
            self._drop_oldest(empty)

        def change(held: Tensor) -> Tensor:
            index = rows.to(held.device)
            return selected(held, index, self.ahead) if held is self.keys or held is self.values else held[index]

        self._map_rows(change)
        self.cumulative_length -= padding
        self.start, self.padding = lessened(self.start, 0), lessened(self.padding, padding)

    def _drop_oldest(self, count: int) -> None:
        """Drops the leading ``count`` slots, which are empty in every row that stays; what is left are views."""
        self.keys, self.values = self.keys[:, :, count:], self.values[:, :, count:]
        for name in self.per_slot:
            beside = getattr(self, name)
            if beside is not None:
                setattr(self, name, beside[..., count:])
        self.start = lessened(self.start, count)
        self.floor = max(0, self.floor - count)

    def reset(self) -> None:
        """Forgets everything; the layer can be filled again."""
        self.keys = self.values = None  # type: ignore[assignment]
        self.is_initialized = False
        self._clear()
