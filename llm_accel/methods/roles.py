"""The roles a method can play. The patches know these roles and never a method by name."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from llm_accel.methods.base import option
from llm_accel.methods.budget import Budgeted


@dataclass(frozen=True)
class PromptView:
    """What a method sees of one layer once the prompt is complete. Slots are right-aligned: row ``b`` holds real
    entries in ``[start[b], S)``, oldest first; everything left of ``start[b]`` is padding.

    Attributes:
        query: the last observed queries, post-RoPE, [B, Hq, W, D]; row ``i`` belongs to slot ``S - W + i``.
        key: all keys as attention sees them, post-RoPE, [B, H, S, D]; H is Hk, or Hq where the model expands latents.
        kv_heads: heads that the cache stores and that decide on their own (1 for latent caches).
        start: first real slot of each row, int64 [B]; None when no row is padded.
        scaling: softmax scale.
        softcap: logit soft cap, or None.
        sinks: learned sink logits per query head [Hq], or None.
        layer: index of the layer.
        layers: number of layers of the model.
        protected: slots that must stay, bool [B, S], or None.
    """

    query: Tensor
    key: Tensor
    kv_heads: int
    start: Tensor | None
    scaling: float
    softcap: float | None
    sinks: Tensor | None
    layer: int
    layers: int
    protected: Tensor | None = None

    @property
    def slots(self) -> int:
        """Stored slots S, padding included."""
        return self.key.shape[2]


@dataclass(frozen=True)
class ScoreAndKeep(Budgeted):
    """Role: decides, once the prompt is complete, which KV entries stay (per row, KV head and layer)."""

    skip_layers: tuple[int, ...] = option("layers that stay dense, for example 0+1", ())
    compress: Literal["eager", "deferred"] = option(
        "eager: inside each layer at the end of the prompt; deferred: before the first decode step",
        "eager",
    )
    multi_turn: Literal["append", "recompress"] = option(
        "append: later turns are added whole; recompress: each later turn cuts the cache back to the budget",
        "append",
    )

    def validate(self) -> None:
        super().validate()
        if len(set(self.skip_layers)) != len(self.skip_layers) or any(index < 0 for index in self.skip_layers):
            self.fail("skip_layers", "distinct layer indices counted from 0")

    @property
    def observed_queries(self) -> int:
        """How many of the last queries the scores need."""
        return 0

    @abstractmethod
    def select(self, view: PromptView) -> Tensor:
        """Slots to keep: int64 [B, kv_heads, n], ascending; -1 first where a row keeps fewer than n. Asked only when
        the longest row, of S slots, keeps fewer than S."""
