"""What a method sees of one layer, whatever it decides there."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from llm_accel.methods.shard import WHOLE, HeadShard


@dataclass(frozen=True)
class LayerView:
    """Queries and keys of one layer. Slots are right-aligned: row ``b`` holds real entries in ``[start[b], S)``, oldest
    first; everything left of ``start[b]`` is padding.

    Attributes:
        query: the newest T queries, post-RoPE, [B, Hq, T, D]; row ``i`` belongs to slot ``S - T + i``.
        key: all keys as attention sees them, post-RoPE, [B, H, S, D]; H is Hk, or Hq where the model expands latents.
        start: first real slot of each row, int64 [B]; None when no row is padded.
        scaling: softmax scale.
        softcap: logit soft cap, or None.
        sinks: learned sink logits per query head [Hq], or None.
        heads: exchanges tensors with the processes that hold the other heads.
    """

    query: Tensor
    key: Tensor
    start: Tensor | None = field(default=None, kw_only=True)
    scaling: float = field(kw_only=True)
    softcap: float | None = field(default=None, kw_only=True)
    sinks: Tensor | None = field(default=None, kw_only=True)
    heads: HeadShard = field(default=WHOLE, kw_only=True)

    @property
    def slots(self) -> int:
        """Stored slots S, padding included."""
        return self.key.shape[2]
