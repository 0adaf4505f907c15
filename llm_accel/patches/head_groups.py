"""The attention of a layer whose KV heads are stored in two groups: one call per group, merged into one output."""

from __future__ import annotations

from torch import Tensor

from llm_accel.cache import GroupedLayer
from llm_accel.cache.grouped import HeadGroup
from llm_accel.cache.layer import CallStage
from llm_accel.errors import UnsupportedModelError
from llm_accel.methods.kv.head_roles import HeadSplit
from llm_accel.patches.base_attention import ModelAttention
from llm_accel.patches.eviction import Eviction
from llm_accel.patches.phase import Phase
from llm_accel.patches.session import Session
from llm_accel.patches.sink_window import sink_window_attention


class GroupedAttention:
    """Attention and eviction of one layer in the running call.

    Args:
        session: state of the cache.
        split: which heads keep what.
        layer: the layer's entries, the new ones included.
        index: index of the layer.
        attention: what the model would have computed.
    """

    def __init__(
        self, session: Session, split: HeadSplit, layer: GroupedLayer, index: int, attention: ModelAttention
    ) -> None:
        self.session, self.split, self.layer, self.index, self.attention = session, split, layer, index, attention

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [B, Hq, T, D], new key and value [B, Hk, T, D] -> [B, T, Hq, Dv]. While no head has lost anything, one
        call serves all heads, bit for bit that of the dense model."""
        if query.shape[1] % self.layer.kv_heads:
            raise UnsupportedModelError(
                f"{query.shape[1]} query heads do not share {self.layer.kv_heads} KV heads evenly."
            )
        group_size = query.shape[1] // self.layer.kv_heads
        limit = self.split.sinks + self.split.recent
        whole = self.layer.whole(key, value, limit)
        output: Tensor | None = None
        if whole is not None and (self.split.prefill != "lambda" or whole[0].shape[2] <= limit):
            output = self.layer.attend(self.attention, query, *whole)
        merged = output is not None
        for group in self.layer.groups:
            heads = group.index(query.device, group_size)
            attention = self.attention.of_heads(heads)
            part_query = query.index_select(1, heads)
            group.store.stage = CallStage.IDLE
            if not merged:
                part = self._attend(group, attention, part_query)
                output = part.new_empty(*part.shape[:2], query.shape[1], part.shape[-1]) if output is None else output
                output[:, :, heads] = part
            self._evict(group, attention, part_query)
        if self.session.phase is Phase.PREFILL_END:
            self.layer.compressed = any(group.store.compressed for group in self.layer.groups)
        assert output is not None
        return output

    def _attend(self, group: HeadGroup, attention: ModelAttention, query: Tensor) -> Tensor:
        store = group.store
        decoding = store.physical_length() <= self.split.sinks + self.split.recent and query.shape[2] == 1
        if group is not self.layer.stream or self.split.prefill != "lambda" or decoding:
            return store.attend(attention, query, store.keys, store.values)
        return sink_window_attention(
            attention,
            query,
            store.keys,
            store.values,
            store.start,
            self.split.sinks,
            self.split.recent,
        )

    def _evict(self, group: HeadGroup, attention: ModelAttention, query: Tensor) -> None:
        store, stream = group.store, group is self.layer.stream
        kv_method = self.split.streaming if stream else self.split.full_compression
        if kv_method is not None:
            eviction = Eviction(self.session, kv_method, store, self.index, attention)
            if stream and self.split.prefill != "dense":
                eviction.closing = True
            eviction.after_attention(query, store.keys)
        elif self.session.phase is Phase.PREFILL_END:
            store.own_storage()
