"""The cache that a compiled decode step sees, and the lease under which a session holds it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from llm_accel.kernels.block_list import BLOCK_K
from llm_accel.patches.base_attention import stores_latents
from llm_accel.patches.compiled.attending import FixedAttending
from llm_accel.patches.compiled.entries import FixedEntries
from llm_accel.patches.compiled.fixed import FixedLayer, Shape, bucket, round_up
from llm_accel.patches.compiled.groups import FixedGroups
from llm_accel.patches.compiled.linear import FixedLinear
from llm_accel.patches.compiled.pages import FixedPages
from llm_accel.patches.compiled.slots import FixedSlots
from llm_accel.patches.layers import AccelLayer, AttendingLayer, GroupedLayer, RaggedLayer, SlotLayer
from llm_accel.patches.layers.hybrid import LinearLayer
from llm_accel.patches.vision.state import VisualState

if TYPE_CHECKING:
    from llm_accel.methods import ScoreAndKeep
    from llm_accel.patches.session import Session

ROOM = 256  # decoded tokens for which there is room where nobody has said how many will come
_ENDLESS = 2**40  # tokens of a prompt that exceeds every budget
_SMALL = 4096  # budgets up to this one get their buffers whole, even after shorter prompts


class FixedCache(Cache):
    """What the decoder is given in place of cache and session. Python values in it are constants.

    Attributes:
        fixed: its layers, those aside that hold nothing.
        seen: logical length, int64 []; models whose callers leave out ``position_ids`` count from it.
        visual: that no visual token is under way, for the hooks that ask.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__(layers=[*layers])
        self.fixed = [layer for layer in layers if isinstance(layer, FixedLayer | FixedLinear)]
        buffers = [tensor for layer in self.fixed for tensor in layer.tensors()]
        self.seen = torch.zeros((), dtype=torch.long, device=buffers[0].device)
        self.visual = VisualState()
        for tensor in (self.seen, *buffers):
            torch._dynamo.mark_static_address(tensor)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """The logical length as a tensor: a number would be a constant of the graph."""
        return self.seen

    def begin(self) -> Hashable:
        """What tells the graph of the next step from those of others; Python values of the layers are set for it."""
        return tuple(layer.begin() for layer in self.fixed)

    def advance(self) -> None:
        """The step that :meth:`begin` announced has been done."""
        for layer in self.fixed:
            layer.advance()

    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(tensor.nbytes for layer in self.fixed for tensor in layer.tensors())

    def attend(
        self, index: int, base: str, module: Any, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any
    ) -> Tensor:
        """Attention of one layer, [B, 1, Hq, Dv]."""
        layer = self.layers[index]
        assert isinstance(layer, FixedLayer)
        return layer.attend(base, module, query, key, value, **kwargs)


class Recipe:
    """Which fixed layers a session needs. Sessions with equal ``key`` run one graph and may share one cache in turn.

    Attributes:
        key: everything that is constant in the graph.
        pairs: fixed layer by fixed layer, the layer whose entries it takes.
        room: tokens that can be decoded before the buffers are full.
    """

    def __init__(self, session: Session, decoder: Any, room: int) -> None:
        self.room = room
        self._session, self._config = session, decoder.config
        self._latents = stores_latents(decoder)
        self._plans = {index: self._plan(index, layer) for index, layer in session.ours.items()}
        states = [layer for index, layer in enumerate(session.layers) if index not in session.ours]
        self.key: Hashable = (tuple(self._plans.values()), tuple(FixedLinear.key(layer) for layer in states))

    def build(self) -> FixedCache:
        """An empty cache of this kind, for calls in every mode of autograd: it goes from one to the next."""
        with torch.inference_mode(False), torch.no_grad():
            return FixedCache([self._fixed(index, layer) for index, layer in enumerate(self._session.layers)])

    def _fixed(self, index: int, layer: Any) -> Any:
        """The counterpart of one layer; one that holds nothing stands for itself."""
        if index not in self._plans:
            return FixedLinear(layer) if isinstance(layer, LinearLayer) else layer
        made = [kind(*arguments) for kind, arguments in self._plans[index]]
        if isinstance(layer, GroupedLayer):
            return FixedGroups(made, layer.groups, int(self._config.num_attention_heads))
        return made[0]

    def _plan(self, index: int, layer: AccelLayer) -> tuple[tuple[type[FixedLayer], tuple[Any, ...]], ...]:
        plan = self._session.plan
        keeper = plan.keeper if index not in plan.skipped else None
        if isinstance(layer, GroupedLayer):
            assert plan.split is not None
            keepers = {id(layer.full): plan.split.full_compression, id(layer.stream): plan.split.streaming}
            return tuple(self._part(index, group.store, keepers[id(group)]) for group in layer.groups)
        return (self._part(index, layer, keeper),)

    def _part(
        self, index: int, layer: AccelLayer, keeper: ScoreAndKeep | None
    ) -> tuple[type[FixedLayer], tuple[Any, ...]]:
        plan, count = self._session.plan, layer.physical_length()
        if isinstance(layer, SlotLayer):
            assert layer.capacity is not None
            capacity = layer.capacity if layer.capacity <= _SMALL else min(layer.capacity, bucket(count + self.room))
            if capacity < layer.capacity:
                self.room = min(self.room, capacity - count)
            return FixedSlots, (Shape.of(layer, capacity), keeper, index, plan.layers)
        limit = None
        if keeper is not None and keeper.ratio is None:
            limit = keeper.layer_entries(_ENDLESS, plan.depth(index, later=False))
        if isinstance(layer, RaggedLayer) and layer.table is not None:
            entries = self._entries(layer.mean_length(), limit)
            return FixedPages, (Shape.of(layer, entries + self.room), layer.page, self.room)
        capacity = plan.capacity
        if count + self.room > capacity:
            capacity = self._entries(count, limit) + self.room
        group = None if self._latents else int(self._config.num_attention_heads) // self._session.ours[index].kv_heads
        if isinstance(layer, AttendingLayer):
            shape = Shape.of(layer, round_up(capacity, max(BLOCK_K)))  # whole blocks of any size
            heads = shape.heads if group is not None else int(self._config.num_attention_heads)
            return FixedAttending, (shape, group, heads, layer.method, layer.index, layer.layers)
        return FixedEntries, (Shape.of(layer, round_up(capacity)), group)

    def _entries(self, count: int, limit: int | None) -> int:
        """Entries that there must be place for, now that there are ``count``: as many after every prompt, if possible,
        and not many times more than needed."""
        if limit is not None and count <= limit and (limit <= _SMALL or count == limit):
            return limit
        return bucket(count)


def pairs(cache: FixedCache, session: Session) -> Iterator[tuple[Any, Any]]:
    """Every fixed layer with the layer whose tensors it takes."""
    for fixed, layer in zip(cache.layers, session.layers, strict=True):
        if isinstance(layer, GroupedLayer):
            assert isinstance(fixed, FixedGroups)
            yield from zip(fixed.parts, (group.store for group in layer.groups), strict=True)
        elif isinstance(fixed, FixedLayer | FixedLinear):
            yield fixed, layer


class Lease:
    """A fixed cache in the hands of one session. As soon as anybody looks at the session's own layers, their entries
    are moved back and the lease ends.

    Attributes:
        cache: what the graph works on.
        key: the kind of cache.
        kind: a number for it, since it is looked up at every step and the key is long.
        room: tokens that can still be decoded.
        sealed: whether the layers have let go of their entries; before that, nothing that happens here is final.

    Args:
        back: takes the cache when the lease ends.
    """

    def __init__(
        self, cache: FixedCache, recipe: Recipe, session: Session, back: Callable[[Lease], None], kind: int
    ) -> None:
        self.cache, self.key, self.kind, self.room = cache, recipe.key, kind, recipe.room
        self.sealed = False
        self._session, self._back, self._steps = session, back, 0
        for fixed, layer in pairs(cache, session):
            fixed.take(layer)

    def seal(self) -> None:
        """From now on the entries are in the buffers alone."""
        if self.sealed:
            return
        self.sealed = True
        for fixed, layer in pairs(self.cache, self._session):
            for name in fixed.taken:
                layer.__dict__.pop(name, None)
            layer.lease = self

    def advance(self) -> None:
        """Counts one token that the graph has added to every layer."""
        self.cache.advance()
        self._steps += 1
        self.room -= 1
        stores = [layer for _, layer in pairs(self.cache, self._session) if isinstance(layer, AccelLayer)]
        for layer in {id(layer): layer for layer in (*self._session.ours.values(), *stores)}.values():
            layer.cumulative_length += 1
            layer.expected = False

    def unseal(self) -> None:
        """The layers hold all entries again, beside the buffers: the next step may fail."""
        if not self.sealed:
            return
        self._return()
        for fixed, layer in pairs(self.cache, self._session):
            fixed.take(layer)

    def end(self, broken: bool = False) -> None:
        """Moves all entries back; ``broken``: after a step that failed half-way, which the next call must find out."""
        self._session.lease = None
        if self.sealed:  # else the layers hold all they held
            self._return()
            for layer in self._session.ours.values():
                layer.attended = layer.attended and not broken
            self._back(self)

    def _return(self) -> None:
        for fixed, layer in pairs(self.cache, self._session):
            if layer.lease is self:
                layer.lease = None
                fixed.give(layer, self._steps)
                if isinstance(layer, AccelLayer) and layer.positions is not None and "positions" not in fixed.taken:
                    layer.append_positions(self._steps)
        self.sealed, self._steps = False, 0
