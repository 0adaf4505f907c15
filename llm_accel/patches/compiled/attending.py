"""Fixed buffers whose attention a method computes."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor, nn

from llm_accel.methods.attention import AttentionMethod
from llm_accel.patches.base_attention import softmax_of
from llm_accel.patches.compiled.entries import FixedEntries
from llm_accel.patches.compiled.fixed import Shape
from llm_accel.patches.layers import AccelLayer, AttendingLayer


class FixedAttending(FixedEntries):
    """An :class:`AttendingLayer` of fixed size.

    Args:
        heads: KV heads that attention sees, which are more than those stored where the model expands them.
        method: computes the attention.
        index: index of the layer.
        layers: number of layers of the model.
    """

    taken = (*FixedEntries.taken, "memory")

    def __init__(
        self, shape: Shape, group: int | None, heads: int, method: AttentionMethod, index: int, layers: int
    ) -> None:
        super().__init__(shape, group)
        self._own = method.fixed_step(index, layers, shape.rows, heads, shape.device)

    def tensors(self) -> list[Tensor]:
        """All buffers, the method's too."""
        return [*super().tensors(), *self._own.tensors()]

    def take(self, layer: AccelLayer) -> None:
        """Copies the entries of a layer and what the method remembers."""
        assert isinstance(layer, AttendingLayer)
        super().take(layer)
        self._own.take(layer.memory, layer.physical_length(), layer.start)

    def give(self, layer: AccelLayer, steps: int) -> None:
        """Writes both back."""
        assert isinstance(layer, AttendingLayer)
        super().give(layer, steps)
        layer.memory = self._own.give()
        layer.sparse_calls += self._own.sparse_steps

    def begin(self) -> Hashable:
        """What is constant in the next step."""
        return self._own.begin()

    def advance(self) -> None:
        """The step has been done."""
        self._own.advance()

    def attend(self, base: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        """The method's attention, or dense attention in steps that it leaves."""
        output = self._own.attend(query, key, value, self.lengths, **softmax_of(kwargs, key.shape[-1]))
        return super().attend(base, module, query, key, value, **kwargs) if output is None else output
