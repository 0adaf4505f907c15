"""The fixed form of a layer: buffers whose size and address never change, so that one graph serves each step."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from llm_accel.cache.attention import Attention

GRANULE = 64  # capacities are multiples of it


class SlotStep(Protocol):
    """A method's part in a decode step over slots that are overwritten. Equal ones make the same graph."""

    @property
    def accumulates(self) -> bool:
        """Whether entries are ranked by the attention that they have received."""

    def __call__(
        self,
        attention: Attention,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        start: Tensor,
        positions: Tensor,
        scores: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Output [B, 1, Hq, Dv], the scores with the attention of this step, and the slot that the next token
        overwrites in a row without an empty one, int64 [B, Hk]."""


class IndexStep(Protocol):
    """A decode step of sparse attention with its index in tensors of fixed size."""

    sparse_steps: int

    def tensors(self) -> list[Tensor]:
        """What a graph reads and writes, beside keys and values."""

    def begin(self) -> Hashable:
        """What is constant in the next step: the graph that it is."""

    def advance(self) -> None:
        """The step that :meth:`begin` announced has been done."""


@dataclass(frozen=True)
class Shape:
    """The buffers of one layer.

    Attributes:
        rows, heads, capacity: of the buffers [B, Hk, C, D].
        key_width, value_width: channels D and Dv.
        dtype, device: of keys and values.
    """

    rows: int
    heads: int
    capacity: int
    key_width: int
    value_width: int
    dtype: torch.dtype
    device: torch.device

    def buffers(self) -> dict[str, Tensor]:
        """Keys and values, zeros: nothing that is hidden may be infinite."""
        size = (self.rows, self.heads, self.capacity)
        widths = {"keys": self.key_width, "values": self.value_width}
        return {name: torch.zeros(*size, width, dtype=self.dtype, device=self.device) for name, width in widths.items()}

    def numbers(self, *size: int) -> Tensor:
        """int64 zeros."""
        return torch.zeros(size, dtype=torch.long, device=self.device)


@dataclass(frozen=True)
class FixedSpec:
    """All that is constant in the graph of one layer.

    Attributes:
        shape: of the buffers.
        kernel: whether the kernel that takes lengths reads them; else attention is masked.
        headroom: tokens that are yet to come, where pages must be reserved for them.
        step: what is overwritten, in layers whose slots are.
        heads: KV heads that sparse attention sees, which are more than those stored where the model expands them.
    """

    shape: Shape
    kernel: bool = False
    headroom: int = 0
    step: SlotStep | None = None
    heads: int = 0


@dataclass
class FixedForm:
    """The buffers of one layer, and what the host knows of them.

    Attributes:
        tensors: by name.
        spec: what they were made for; None for a linear-attention state and for heads in groups.
        index: a method's index, where attention is sparse.
        parts: the forms of groups of heads, where these are stored apart.
        held: entries per row, padding included, that were put in.
        steps: decode steps since.
        stepping: whether a step is under way, in which the graph writes into the buffers.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    spec: FixedSpec | None = None
    index: Any = None
    parts: tuple[FixedForm, ...] = ()
    held: int = 0
    steps: int = 0
    stepping: bool = False

    def all(self) -> list[Tensor]:
        """Every tensor that a graph reads or writes."""
        own = [*self.tensors.values(), *(() if self.index is None else self.index.tensors())]
        return own + [tensor for part in self.parts for tensor in part.all()]

    def beside_entries(self) -> list[Tensor]:
        """All but keys and values."""
        own = [tensor for name, tensor in self.tensors.items() if name not in ("keys", "values")]
        return own + ([] if self.index is None else self.index.tensors())

    def clear(self) -> None:
        """Keys and values are zeros again: an earlier cache's may be infinite, and nothing that is hidden may be."""
        for name in ("keys", "values"):
            if name in self.tensors:
                self.tensors[name].zero_()
        for part in self.parts:
            part.clear()


def restoring(tensors: Sequence[Tensor]) -> Callable[[], None]:
    """Remembers what ``tensors`` hold; call the result to write it back."""
    before = [tensor.clone() for tensor in tensors]

    def restore() -> None:
        for tensor, content in zip(tensors, before, strict=True):
            tensor.copy_(content)

    return restore


def together(calls: Sequence[Callable[[], None]]) -> Callable[[], None]:
    """All of them as one call."""

    def call() -> None:
        for one in calls:
            one()

    return call


def round_up(count: int, granule: int = GRANULE) -> int:
    """The next multiple of the granule."""
    return -(-count // granule) * granule


def bucket(count: int) -> int:
    """A size of at least ``count``, one of eight between two powers of two, so that different prompts share graphs."""
    step = max(GRANULE, 1 << max(0, count.bit_length() - 4))
    return -(-count // step) * step
