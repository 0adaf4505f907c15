"""A method's part in decode steps, as the stores take it: what it overwrites, and the sparse attention it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm_accel.cache.attention import Attention
from llm_accel.kernels.column_votes import column_votes
from llm_accel.methods.attention import AttentionMethod, AttentionView, FixedStep
from llm_accel.methods.roles import StepEviction, StepView
from llm_accel.methods.shard import WHOLE, HeadShard


@dataclass(frozen=True)
class OverwritingStep:
    """A :class:`~llm_accel.cache.fixed.SlotStep` on layer ``layer`` of ``layers``."""

    method: StepEviction
    layer: int
    layers: int

    @property
    def accumulates(self) -> bool:
        """Whether entries are ranked by the attention that they have received."""
        return self.method.accumulates

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
        """Output, scores and victims of one step: in one operation, or attention first and what follows from it."""
        softmax = attention.softmax(key.shape[-1])
        # all heads are here; said aloud, because the compiler takes no object from a default
        view = AttentionView(
            query, key, value, start=start, layer=self.layer, layers=self.layers, heads=WHOLE, **softmax
        )
        step = self.method.attend_and_choose(view, StepView(positions, scores))
        if step is not None:
            return step
        slots = torch.arange(key.shape[2], device=key.device)
        visible = slots[None, None, None] >= start[:, None, None, None]
        output = attention.visible(query, key, value, visible)
        if scores is not None:
            votes = column_votes(query, key, start, heads=positions.shape[1], group="sum", **softmax)
            scores = scores * self.method.score_decay + votes
        return output, scores, self.method.victims(StepView(positions, scores))


@dataclass(frozen=True)
class SparseAttention:
    """A :class:`~llm_accel.cache.sparse.Sparse` on layer ``layer`` of ``layers``, of whose heads ``heads`` are here."""

    method: AttentionMethod
    layer: int
    layers: int
    heads: HeadShard

    def attend(
        self, attention: Attention, query: Tensor, key: Tensor, value: Tensor, start: Tensor | None, memory: Any
    ) -> tuple[Tensor | None, Any]:
        """Output [B, T, Hq, Dv], or None where dense attention is to be computed, and the memory for the next call."""
        softmax = attention.softmax(key.shape[-1])
        view = AttentionView(
            query, key, value, start=start, **softmax, layer=self.layer, layers=self.layers, heads=self.heads
        )
        return self.method.attend(view, memory)

    def remember(self, tensors: dict[str, Tensor], values: dict[str, int]) -> Any:
        """The memory that was stored as these."""
        return self.method.remember(tensors, values)

    def fixed_step(self, rows: int, heads: int, device: torch.device) -> FixedStep:
        """The method's index in tensors of fixed size."""
        return self.method.fixed_step(self.layer, self.layers, rows, heads, device)
