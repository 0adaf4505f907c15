"""What a store asks of the model: dense attention, and how logits become probabilities."""

from __future__ import annotations

from typing import Protocol, TypedDict

from torch import Tensor


class Softmax(TypedDict):
    """How a layer turns logits into probabilities.

    Attributes:
        scaling: softmax scale.
        softcap: logit soft cap, or None.
        sinks: learned sink logits per query head [Hq], or None.
    """

    scaling: float
    softcap: float | None
    sinks: Tensor | None


class Attention(Protocol):
    """The attention of one layer of a model in the running call."""

    def dense(self, query: Tensor, key: Tensor, value: Tensor, start: Tensor | None) -> Tensor:
        """Dense attention of the newest T queries over all entries.

        Args:
            query: [B, Hq, T, D]; the last T slots belong to these queries, causal among themselves.
            key, value: [B, H, P, D].
            start: first real slot of each row, int64 [B], or None.

        Returns:
            [B, T, Hq, Dv], as attention functions of transformers return it.
        """

    def visible(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
        """Dense attention of one query per row, [B, Hq, 1, D], over the slots under ``visible``, bool [B, 1, 1, C];
        [B, 1, Hq, Dv]."""

    def softmax(self, head_dim: int) -> Softmax:
        """How logits become probabilities; ``head_dim`` sets the scale where the model passes none."""
