"""The role of methods that compute attention in another way. Every entry stays in the cache."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self

from torch import Tensor

from llm_accel.kernels.dispatch import Problem
from llm_accel.methods.base import MethodConfig


@dataclass(frozen=True)
class AttentionView:
    """One attention call of one layer. Slots are right-aligned: row ``b`` holds real entries in ``[start[b], S)``.

    Attributes:
        query: the newest T queries, post-RoPE, [B, Hq, T, D]; row ``i`` belongs to slot ``S - T + i``.
        key: all keys as attention sees them, post-RoPE, [B, H, S, D].
        value: [B, H, S, Dv].
        start: first real slot of each row, int64 [B]; None when no row is padded.
        scaling: softmax scale.
        softcap: logit soft cap, or None.
        sinks: learned sink logits per query head [Hq], or None.
        layer: index of the layer.
        layers: number of layers of the model.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    start: Tensor | None
    scaling: float
    softcap: float | None
    sinks: Tensor | None
    layer: int
    layers: int

    @property
    def queries(self) -> int:
        """New queries T."""
        return self.query.shape[2]

    @property
    def slots(self) -> int:
        """Stored slots S, padding included."""
        return self.key.shape[2]


class Memory(Protocol):
    """What a method keeps of one layer from one decode step to the next. It lives and dies with the cache layer."""

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The memory after the rows of the batch were reordered, repeated or selected."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Tensors and numbers to be stored with the cache."""


@dataclass(frozen=True)
class Attend(MethodConfig):
    """Role: computes the attention of a layer in another way."""

    def dense_layer(self, layer: int, layers: int) -> str | None:
        """Why a layer is left to the model's own attention; None where the method acts on it."""
        return None

    def backends(self, problem: Problem) -> dict[str, tuple[str, str]]:
        """Operation -> (backend, reason) for the attention of one model."""
        return {}

    @abstractmethod
    def attend(self, view: AttentionView, memory: Memory | None) -> tuple[Tensor | None, Memory | None]:
        """Output [B, T, Hq, Dv], or None where the model's own attention is to be called, and the memory for the next
        call on this layer; None forgets."""

    @abstractmethod
    def remember(self, tensors: dict[str, Tensor], values: dict[str, int]) -> Memory:
        """The memory that :meth:`Memory.state` wrote."""
