"""A cache layer whose attention a method computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from llm_accel.methods.attention import AttentionMethod, AttentionView, Memory
from llm_accel.methods.shard import WHOLE, HeadShard
from llm_accel.patches.base_attention import softmax_of
from llm_accel.patches.layers.append import AccelLayer

_PREFIX = "memory."


class AttendingLayer(AccelLayer):
    """Keys and values as in the base; the memory is forgotten whenever the cache is rolled back or emptied.

    Attributes:
        method: computes the attention.
        index: index of the layer.
        layers: number of layers of the model.
        heads: which of the layer's heads are here.
        memory: what the method remembers of the latest decode step, or None.
        sparse_calls: attention calls that the method computed; the others were dense.
    """

    def __init__(self, method: AttentionMethod, index: int, layers: int, heads: HeadShard = WHOLE) -> None:
        self.method, self.index, self.layers, self.heads = method, index, layers, heads
        super().__init__()

    def _clear(self) -> None:
        super()._clear()
        self.memory: Memory | None = None
        self.sparse_calls = 0

    def attend(self, base: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        """The method's attention, or dense attention where it leaves the call to the model, [B, T, Hq, Dv]."""
        softmax = softmax_of(kwargs, key.shape[-1])
        view = AttentionView(
            query, key, value, start=self.start, **softmax, layer=self.index, layers=self.layers, heads=self.heads
        )
        output, self.memory = self.method.attend(view, self.memory)
        if output is None:
            return super().attend(base, module, query, key, value, **kwargs)
        self.sparse_calls += 1
        return output

    def attend_again(
        self, base: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any
    ) -> Tensor:
        """Dense: what the method remembers belongs to this layer's own queries."""
        return super().attend(base, module, query, key, value, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest ``-tokens_to_remove`` tokens."""
        super().crop(tokens_to_remove)
        self.memory = None

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._map_rows(change)
        self.memory = None if self.memory is None else self.memory.map_rows(change)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As in the base, with the memory."""
        tensors, values = super().state()
        if self.memory is None:
            return tensors, values
        own_tensors, own_values = self.memory.state()
        tensors |= {_PREFIX + name: tensor for name, tensor in own_tensors.items()}
        return tensors, values | {_PREFIX + name: value for name, value in own_values.items()}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Fills an empty layer with what :meth:`state` gave."""
        own_tensors, tensors = _divided(tensors)
        own_values, values = _divided(values)
        super().restore(tensors, values)
        self.memory = self.method.remember(own_tensors, own_values) if own_values else None


def _divided(named: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What belongs to the memory, and the rest."""
    own = {name.removeprefix(_PREFIX): content for name, content in named.items() if name.startswith(_PREFIX)}
    return own, {name: content for name, content in named.items() if not name.startswith(_PREFIX)}
