"""Two groups of KV heads in one layer: some keep everything, the others sinks and a window."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_accel.cache.attention import Attention
from llm_accel.cache.fixed import FixedForm, FixedSpec, together
from llm_accel.cache.layer import AccelLayer, CallStage
from llm_accel.cache.slots import SlotLayer
from llm_accel.errors import UnsupportedModelError

_GROUPS = ("full", "stream")
_OWN = ("cumulative_length", "compressed")


class HeadGroup:
    """KV heads of a layer that are stored alike.

    Attributes:
        heads: their indices, ascending.
        store: their entries, [B, len(heads), P, D].
    """

    def __init__(self, heads: Sequence[int], store: AccelLayer) -> None:
        self.heads, self.store = tuple(heads), store
        self._index: Tensor | None = None

    def index(self, device: torch.device, group: int = 1) -> Tensor:
        """Indices of the KV heads, or with ``group`` of the query heads that read them, int64."""
        if self._index is None or self._index.device != device:
            with torch.inference_mode(False):  # it serves later calls, in whichever mode they run
                self._index = torch.tensor(self.heads, dtype=torch.long, device=device)
        if group == 1:
            return self._index
        return (self._index[:, None] * group + torch.arange(group, device=device)).flatten()


class GroupedLayer(AccelLayer):
    """Each group lives in a store of its own, so that heads of one layer can hold different numbers of entries; weights
    stay as they are. ``keys`` and ``values`` are None: there is no single tensor of all heads.

    Attributes:
        groups: full heads first; groups without heads are left out.
    """

    row_tensors = ("start",)

    def __init__(self, full: Sequence[int], kv_heads: int) -> None:
        self._heads = kv_heads
        rest = [head for head in range(kv_heads) if head not in full]
        self.full = HeadGroup(sorted(full), AccelLayer())
        self.stream = HeadGroup(rest, SlotLayer())
        self.groups = [group for group in (self.full, self.stream) if group.heads]
        super().__init__()

    def add(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Stores new entries [B, Hk, T, D] and returns just these: :mod:`llm_accel.patches.head_groups` reads the
        stores."""
        if key_states.shape[1] != self.kv_heads:
            raise UnsupportedModelError(
                f"the layer was planned for {self.kv_heads} KV heads and got {key_states.shape[1]}; latent attention "
                "cannot be split by head profiles."
            )
        self._admit(key_states.shape[-2])
        for group in self.groups:
            index = group.index(key_states.device)
            group.store.stage = CallStage.AWAITED
            group.store.add(key_states.index_select(1, index), value_states.index_select(1, index))
        self.is_initialized = True
        return key_states, value_states

    def thaw(self) -> None:
        """Makes tensors of a call in inference mode usable in a call outside of it."""
        super().thaw()
        for group in self.groups:
            group.store.thaw()

    def pad(self, padding: Tensor, count: int) -> None:
        """Marks the leading padding of each row; a stream that was cut before the prompt ended may still get some."""
        if self.compressed:
            return
        self.start = padding.clone()
        real = self.cumulative_length - padding
        for group in self.groups:
            store = group.store
            store.padding = padding.clone()
            missing = store.physical_length() - real
            store.start = missing.clamp(min=0) if store.start is None else torch.maximum(store.start, missing)
            if isinstance(store.positions, Tensor):
                newest = real[:, None] - count + torch.arange(count, device=real.device)
                newest = newest.clamp(min=-1)[:, None].expand(-1, store.positions.shape[1], -1)
                store.positions = torch.cat([store.positions[..., :-count], newest], dim=-1)

    def whole(self, key_states: Tensor, value_states: Tensor, limit: int) -> tuple[Tensor, Tensor] | None:
        """All entries of all heads as one tensor each, where that costs no more than a copy of ``limit`` entries: what
        :meth:`update` was given if there is nothing else, or the merged stores while none has evicted. Else None."""
        slots = {group.store.physical_length() for group in self.groups}
        if slots != {self.cumulative_length}:
            return None
        if self.cumulative_length == key_states.shape[2]:
            return key_states, value_states
        if self.cumulative_length > limit:
            return None
        merged = []
        for name, new in (("keys", key_states), ("values", value_states)):
            full = new.new_empty(*new.shape[:2], self.cumulative_length, new.shape[3])
            for group in self.groups:
                full[:, group.index(new.device)] = getattr(group.store, name)
            merged.append(full)
        return merged[0], merged[1]

    def physical_length(self) -> int:
        """Slots of the longest store."""
        self.unfix()
        return max((group.store.physical_length() for group in self.groups), default=0)

    def mean_length(self) -> int:
        """Slots stored per KV head, averaged over the heads and rounded up."""
        self.unfix()
        return -(-sum(len(group.heads) * group.store.physical_length() for group in self.groups) // self._heads)

    @property
    def rows(self) -> int:
        """Rows that are stored."""
        return self.groups[0].store.rows

    @property
    def kv_heads(self) -> int:
        """All KV heads of the layer."""
        return self._heads

    def nbytes(self) -> int:
        """Bytes of the storage behind all stores."""
        self.unfix()
        return sum(group.store.nbytes() for group in self.groups)

    def token_bytes(self) -> int:
        """Bytes that one token takes in all rows and heads."""
        return sum(group.store.token_bytes() for group in self.groups)

    def own_storage(self) -> None:
        """Lets no store keep a larger tensor alive."""
        for group in self.groups:
            group.store.own_storage()

    def kept_positions(self) -> Tensor | None:
        """Original positions of the entries of each head, int64 [B, Hk, n], ascending, -1 first where it has fewer."""
        if not self.physical_length():
            return None
        parts = {group.heads: _positions(group.store) for group in self.groups}
        longest = max(part.shape[-1] for part in parts.values())
        batch, device = next(iter(parts.values())).shape[0], next(iter(parts.values())).device
        kept = torch.full((batch, self.kv_heads, longest), -1, dtype=torch.long, device=device)
        for heads, part in parts.items():
            kept[:, list(heads)] = F.pad(part, (longest - part.shape[-1], 0), value=-1)
        return kept

    def crop(self, tokens_to_remove: int) -> None:
        """Passed on to the stores, which refuse to go back past an eviction."""
        self.unfix()
        for group in reversed(self.groups):  # the stream refuses first, before anything is changed
            group.store.crop(tokens_to_remove)
        self.cumulative_length += tokens_to_remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders rows, for beam search."""
        super().reorder_cache(beam_idx)
        for group in self.groups:
            group.store.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row ``repeats`` times."""
        super().batch_repeat_interleave(repeats)
        for group in self.groups:
            group.store.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps only the given rows."""
        super().batch_select_indices(indices)
        for group in self.groups:
            group.store.batch_select_indices(indices)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything the stores hold, under the names of their groups."""
        self.unfix()
        tensors, plain = (
            {} if self.start is None else {"start": self.start},
            {name: getattr(self, name) for name in _OWN},
        )
        for name in _GROUPS:
            group: HeadGroup = getattr(self, name)
            if group.heads:
                held, plain[name] = group.store.state()
                tensors |= {f"{name}.{key}": tensor for key, tensor in held.items()}
        return tensors, plain

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Fills an empty layer with what :meth:`state` gave."""
        self.start = tensors.get("start")
        for name in _OWN:
            setattr(self, name, values[name])
        for name in _GROUPS:
            if name in values:
                own = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
                getattr(self, name).store.restore(own, values[name])
        self.is_initialized = True

    def join(self, parts: Sequence[Self], length: int) -> None:
        """As in the base, store by store."""
        for place, group in enumerate(self.groups):
            group.store.join([part.groups[place].store for part in parts], length)
        self.start = self.groups[0].store.padding
        self.compressed = any(part.compressed for part in parts)
        self.cumulative_length, self.is_initialized = length, True

    def expect(self, tokens: int) -> None:
        """As in the base, store by store."""
        for group in self.groups:
            group.store.expect(tokens)

    def select_rows(self, rows: Tensor, padding: int) -> None:
        """As in the base, store by store."""
        for group in self.groups:
            group.store.select_rows(rows, padding)
        self.cumulative_length -= padding
        self.start = self.groups[0].store.padding

    def reset(self) -> None:
        """Forgets everything; the layer can be filled again."""
        super().reset()
        for group in self.groups:
            group.store.reset()

    def allocate_parts(self, specs: Sequence[FixedSpec]) -> FixedForm:
        """Empty buffers for the fixed forms of the groups."""
        parts = (group.store.allocate(spec) for group, spec in zip(self.groups, specs, strict=True))
        return FixedForm(parts=tuple(parts))

    def fix(self, form: FixedForm) -> None:
        """Puts the entries of each group into its buffers."""
        self.fixed = form  # first, so that `unfix` reaches all groups if one of them cannot
        form.steps, form.stepping = 0, False
        for group, part in zip(self.groups, form.parts, strict=True):
            group.store.fix(part)

    @property
    def is_fixed(self) -> bool:
        """Whether all groups are in their fixed form."""
        return super().is_fixed and all(group.store.is_fixed for group in self.groups)

    def _take_back(self, form: FixedForm) -> None:
        for group in self.groups:
            group.store.unfix()

    def write(self, form: FixedForm, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the new entries of each group; returns just these."""
        for group, part in zip(self.groups, form.parts, strict=True):
            heads = group.index(key_states.device)
            group.store.write(part, key_states.index_select(1, heads), value_states.index_select(1, heads))
        return key_states, value_states

    def attend_fixed(self, attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One call per group, merged into one output, [B, 1, Hq, Dv]."""
        assert self.fixed is not None
        output = query.new_empty(query.shape[0], 1, query.shape[1], value.shape[-1])
        for group, part in zip(self.groups, self.fixed.parts, strict=True):
            readers = group.index(query.device, query.shape[1] // self._heads)
            rows = query.index_select(1, readers)
            output[:, :, readers] = group.store.attend_fixed(
                attention, rows, part.tensors["keys"], part.tensors["values"]
            )
        return output

    def end_step(self) -> None:
        """The graph has added one token."""
        super().end_step()
        for group in self.groups:
            group.store.end_step()

    def backup(self) -> Callable[[], None]:
        """Call the result to undo a step that failed half-way."""
        return together([group.store.backup() for group in self.groups])


def _positions(store: AccelLayer) -> Tensor:
    """Positions of all entries of a store, int64 [B, H, P], ascending, -1 where a slot is empty."""
    slots = torch.arange(store.physical_length(), device=store.keys.device).expand(*store.keys.shape[:2], -1)
    if isinstance(store, SlotLayer) and store.positions is not None:
        return store.seen_positions().sort(-1).values
    if store.positions is not None:
        return store.positions
    return slots if store.start is None else (slots - store.start[:, None, None]).clamp(min=-1)
