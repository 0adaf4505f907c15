"""Linear-attention states at addresses that never change."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from llm_accel.cache.linear import LinearLayer, states_of


class FixedLinear(LinearAttentionLayer):
    """The state of one layer during compiled decode steps, which update it in place; beside attention layers, which
    have buffers of their own.

    Attributes:
        taken: names of the layer's attributes that live here meanwhile.
    """

    taken: ClassVar[tuple[str, ...]] = ("conv_states", "recurrent_states")

    def __init__(self, layer: LinearLayer) -> None:
        super().__init__(layer.number_of_states)
        for kind, flags in (("conv", "is_conv_states_initialized"), ("recurrent", "is_recurrent_states_initialized")):
            for index, state in getattr(layer, f"{kind}_states").items():
                if state is not None:
                    getattr(self, f"{kind}_states")[index] = torch.zeros_like(state)
                    getattr(self, flags)[index] = True
        self.conv_kernel_size = dict(layer.conv_kernel_size)
        self.has_previous_state = dict(layer.has_previous_state)
        self.dtype, self.device = layer.dtype, layer.device

    @staticmethod
    def key(layer: Any) -> Hashable:
        """What decides which graph a layer belongs to."""
        return tuple((name, *state.shape, state.dtype, state.device) for name, state in states_of(layer).items())

    def take(self, layer: LinearLayer) -> None:
        """Copies the state of a layer."""
        for name, state in states_of(layer).items():
            states_of(self)[name].copy_(state)

    def give(self, layer: LinearLayer, steps: int) -> None:
        """Writes the state back, in storage of its own."""
        for name in self.taken:
            held: dict[int, Any] = getattr(self, name)
            setattr(layer, name, {index: None if state is None else state.clone() for index, state in held.items()})

    def begin(self) -> Hashable:
        """Nothing changes from step to step but what lies in tensors."""
        return None

    def advance(self) -> None:
        """Nothing to count."""

    def tensors(self) -> list[Tensor]:
        """All buffers."""
        return list(states_of(self).values())
