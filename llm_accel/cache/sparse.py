"""A cache layer with the index of a sparse attention beside its entries."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch import Tensor

from llm_accel.cache.attention import Attention
from llm_accel.cache.fixed import FixedForm, FixedSpec, IndexStep
from llm_accel.cache.layer import AccelLayer
from llm_accel.cache.store import held

_PREFIX = "memory."


class Sparse(Protocol):
    """The attention of one layer, computed by a method."""

    def attend(
        self, attention: Attention, query: Tensor, key: Tensor, value: Tensor, start: Tensor | None, memory: Any
    ) -> tuple[Tensor | None, Any]:
        """Output [B, T, Hq, Dv], or None where dense attention is to be computed, and the memory for the next call."""

    def remember(self, tensors: dict[str, Tensor], values: dict[str, int]) -> Any:
        """The memory that was saved as these."""

    def fixed_step(self, rows: int, heads: int, device: torch.device) -> IndexStep:
        """The index in tensors of fixed size."""


class SparseLayer(AccelLayer):
    """Keys and values as in the base; the memory is forgotten whenever the cache is rolled back or emptied.

    Attributes:
        sparse: computes the attention.
        memory: what it remembers of the latest decode step, or None.
        sparse_calls: attention calls that it computed; the others were dense.
    """

    memory = held("memory")
    sparse_calls: int = held("sparse_calls")

    def __init__(self, sparse: Sparse) -> None:
        self.sparse = sparse
        super().__init__()

    def _clear(self) -> None:
        super()._clear()
        self.memory = None
        self.sparse_calls = 0

    def attend(self, attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The method's attention, or dense attention where it leaves the call to the model, [B, T, Hq, Dv]."""
        output, self.memory = self.sparse.attend(attention, query, key, value, self.start, self.memory)
        if output is None:
            return super().attend(attention, query, key, value)
        self.sparse_calls += 1
        return output

    def attend_again(self, attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Dense: what the method remembers belongs to this layer's own queries."""
        return super().attend(attention, query, key, value)

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
        self.memory = self.sparse.remember(own_tensors, own_values) if own_values else None

    def allocate(self, spec: FixedSpec) -> FixedForm:
        """Empty buffers for the fixed form, the index among them."""
        form = super().allocate(spec)
        form.index = self.sparse.fixed_step(spec.shape.rows, spec.heads, spec.shape.device)
        return form

    def _put(self, form: FixedForm) -> None:
        super()._put(form)
        form.index.take(self.memory, form.held, self.start)

    def _take_back(self, form: FixedForm) -> None:
        self.memory = form.index.give()
        super()._take_back(form)
        self.sparse_calls += form.index.sparse_steps

    def begin_step(self) -> Hashable:
        """A step begins. Returns what is constant in it."""
        super().begin_step()
        assert self.fixed is not None
        pattern: Hashable = self.fixed.index.begin()
        return pattern

    def end_step(self) -> None:
        """The graph has added one token."""
        assert self.fixed is not None
        super().end_step()
        self.fixed.index.advance()

    def attend_fixed(self, attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The method's attention of one new query per row, or dense attention in steps that it leaves."""
        assert self.fixed is not None
        lengths, softmax = self.fixed.tensors["lengths"], attention.softmax(key.shape[-1])
        output: Tensor | None = self.fixed.index.attend(query, key, value, lengths, **softmax)
        return super().attend_fixed(attention, query, key, value) if output is None else output


def _divided(named: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What belongs to the memory, and the rest."""
    own = {name.removeprefix(_PREFIX): content for name, content in named.items() if name.startswith(_PREFIX)}
    return own, {name: content for name, content in named.items() if not name.startswith(_PREFIX)}
