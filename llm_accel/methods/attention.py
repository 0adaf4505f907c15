"""The role of methods that compute attention in another way. Every entry stays in the cache."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from llm_accel.kernels.dispatch import Problem
from llm_accel.methods.base import MethodConfig
from llm_accel.methods.claims import Claim
from llm_accel.methods.layer_view import LayerView


@dataclass(frozen=True)
class AttentionView(LayerView):
    """One attention call of one layer.

    Attributes:
        value: [B, H, S, Dv].
        layer: index of the layer.
        layers: number of layers of the model.
    """

    value: Tensor
    layer: int = field(kw_only=True)
    layers: int = field(kw_only=True)

    @property
    def queries(self) -> int:
        """New queries T."""
        return self.query.shape[2]


class Memory(Protocol):
    """What a method keeps of one layer from one decode step to the next. It lives and dies with the cache layer."""

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The memory after the rows of the batch were reordered, repeated or selected."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Tensors and numbers to be stored with the cache."""


class FixedStep(Protocol):
    """A decode step of one layer as a graph: all that changes lies in tensors of fixed size, or names another graph.

    Attributes:
        sparse_steps: steps since :meth:`take` that the method computed; the others were dense.
    """

    sparse_steps: int

    def tensors(self) -> list[Tensor]:
        """What a graph reads and writes in addition to keys and values."""

    def take(self, memory: Memory | None, slots: int, start: Tensor | None) -> None:
        """Begins where eager decoding stopped, with ``slots`` stored and row ``b`` beginning at ``start[b]``."""

    def give(self) -> Memory:
        """The memory for eager decoding to go on with."""

    def begin(self) -> Hashable:
        """What is constant in the next step: the graph that it is."""

    def advance(self) -> None:
        """The step that :meth:`begin` announced has been done."""

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, *, scaling: float, **softmax: Any
    ) -> Tensor | None:
        """Output [B, 1, Hq, Dv] of one query per row over buffers [B, H, C, D] whose rows fill their first ``lengths``,
        int64 [B], slots, the last of them with the query's own entry; None where the step is dense."""


@dataclass(frozen=True)
class AttentionMethod(MethodConfig):
    """Role: computes the attention of a layer in another way."""

    @property
    def claims(self) -> Mapping[Claim, str]:
        return {
            Claim.ATTENTION: "",
            Claim.ORDER: "reads entries in the order of their positions, which the cache of {other} does not keep; "
            "combine it with a method that compresses the prompt and keeps as many entries in each head: snapkv, "
            "pyramidkv, random.",
        }

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

    def fixed_step(self, layer: int, layers: int, rows: int, heads: int, device: torch.device) -> FixedStep:
        """How a decode step of a layer with ``heads`` KV heads is one graph. Methods without it decode eagerly."""
        raise NotImplementedError

    @abstractmethod
    def remember(self, tensors: dict[str, Tensor], values: dict[str, int]) -> Memory:
        """The memory that :meth:`Memory.state` wrote."""
