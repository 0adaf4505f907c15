"""The role of methods that compress a context once all layers hold it, by letting the model read it again."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm_accel.methods.adakv import best_of_all, of_all_heads
from llm_accel.methods.claims import Claim
from llm_accel.methods.prompt_view import PromptView
from llm_accel.methods.roles import ScoreAndKeep
from llm_accel.methods.selection import slots_of


@dataclass(frozen=True)
class PassView:
    """What a method sees of one layer while the model reads a part of the context again. Rows have no padding.

    Attributes:
        query: all queries of the pass, post-RoPE, [B, Hq, q, D].
        key: the keys that they may attend to, post-RoPE, [B, H, n + q, D]: those of the n entries of the context,
            oldest first, and behind them those of the pass itself.
        kv_heads: heads that the cache stores, each shared by ``Hq / kv_heads`` query heads.
        first, last: the part that is read again holds the entries ``first`` to ``last - 1``.
        scaling: softmax scale.
        softcap: logit soft cap, or None.
        learned_sinks: learned sink logits per query head [Hq], or None.
    """

    query: Tensor
    key: Tensor
    kv_heads: int
    first: int
    last: int
    scaling: float
    softcap: float | None = None
    learned_sinks: Tensor | None = None


@dataclass(frozen=True)
class Lead:
    """Token ids that the model is told before the tokens of a part.

    Attributes:
        first: before the first part.
        later: before each later one, followed by the ``repeated`` tokens of the context that precede it.
        behind: right before the part, the first one included.
        repeated: see ``later``.
    """

    first: tuple[int, ...] = ()
    later: tuple[int, ...] = ()
    behind: tuple[int, ...] = ()
    repeated: int = 8


@dataclass(frozen=True)
class ContextCompression(ScoreAndKeep):
    """Role: compresses the first prompt of a cache, the context. When all layers hold it, the model reads it again,
    part by part, on top of its entries, and :meth:`pass_score` sees the attention. Then all layers evict together. What
    comes later on the same cache is appended whole."""

    @property
    def claims(self) -> Mapping[Claim, str]:
        alone = (
            "lets the model read the context a second time, on entries and with attention that {other} would change; "
            "give one of them alone."
        )
        return dict.fromkeys(Claim, alone)

    @abstractmethod
    def parts(self, length: int) -> list[tuple[int, int]]:
        """The parts that a context of ``length`` tokens is read again in: first token and the one past the last."""

    @property
    def needs_tokenizer(self) -> bool:
        """Whether :meth:`lead` must be given the model's tokenizer."""
        return False

    @abstractmethod
    def lead(self, tokenizer: Any = None) -> Lead:
        """What the model is told before each part."""

    @abstractmethod
    def pass_score(self, view: PassView) -> Tensor:
        """What one pass says of the entries of its part, fp32 [B, kv_heads, last - first], at least 0. Where queries of
        several layers read the same entries, the highest score counts."""

    def score(self, view: PromptView) -> Tensor:
        assert view.scores is not None
        return view.scores

    def select_all(self, views: Sequence[PromptView]) -> list[Tensor]:
        """:meth:`select` for all layers of a prompt, which are known together."""
        return [self.select(view) for view in views]


def slots_of_all_layers(ranks: Sequence[Tensor], totals: Tensor, views: Sequence[PromptView]) -> list[Tensor]:
    """The ``totals[b]`` best entries of all layers and heads of row ``b``; equal ones by the lower index, then the
    earlier layer and head.

    Args:
        ranks: of each layer the order of its entries, int64 [B, H, S], as of
            :func:`~llm_accel.methods.selection.total_order`.
        totals: int64 [B].
        views: the layers; heads in other processes take part.

    Returns:
        slots of each layer, int64 [B, H, n], ascending, -1 first where a row or head keeps fewer than n.
    """
    device = totals.device
    every = [of_all_heads(rank, view.heads).to(device) for rank, view in zip(ranks, views, strict=True)]
    kept = best_of_all(torch.cat(every, dim=1), totals).split([rank.shape[1] for rank in every], dim=1)
    return [
        slots_of(view.heads.mine(mask)[..., -view.slots :].to(view.key.device))
        for mask, view in zip(kept, views, strict=True)
    ]
