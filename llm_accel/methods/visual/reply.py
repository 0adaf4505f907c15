"""The role of methods that change how a reply to an image is decoded."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from llm_accel.kernels.dispatch import Problem
from llm_accel.methods.base import MethodConfig
from llm_accel.methods.claims import Claim
from llm_accel.methods.shard import WHOLE, HeadShard


@dataclass(frozen=True)
class ReplyDecoding(MethodConfig):
    """Role: acts on decode steps after a prompt with visual tokens. The prompt itself is computed and kept as it is,
    and one without an image is left alone."""

    @property
    @abstractmethod
    def penalises(self) -> bool:
        """Whether attention of decode steps is computed in another way."""

    @property
    @abstractmethod
    def prunes(self) -> bool:
        """Whether entries of generated tokens leave the cache."""

    @property
    @abstractmethod
    def contrasts(self) -> bool:
        """Whether the logits are contrasted with those of a second path."""

    @property
    def attends(self) -> bool:
        """Whether there is anything to do in the layers."""
        return self.penalises or self.prunes

    @property
    @abstractmethod
    def observed_queries(self) -> int | None:
        """How many of the last queries of a prompt count in the attention received; None: all."""

    @property
    def claims(self) -> Mapping[Claim, str]:
        if not self.attends:
            return {Claim.DECODING: ""}
        in_layers = (
            "computes attention and chooses entries while decoding, which {other} would decide too; combine it with "
            "methods on visual tokens, or leave only its contrast on (beta=0, keep=1)."
        )
        return {Claim.DECODING: "", Claim.KV: in_layers, Claim.ATTENTION: in_layers}

    def backends(self, problem: Problem) -> dict[str, tuple[str, str]]:
        """Operation -> (backend, reason) for the decode steps of one model."""
        return {}

    @abstractmethod
    def penalised(self, logits: Tensor, received: Tensor, real: Tensor) -> Tensor:
        """Attention logits of one decode step after the penalty.

        Args:
            logits: scaled, finite, fp32 [B, Hq, P].
            received: attention that each entry got from earlier queries, summed, fp32 [B, Hq, P].
            real: bool [B or 1, 1, P], which slots are no padding.
        """

    @abstractmethod
    def saliency(self, weights: Tensor, visual: Tensor, heads: HeadShard = WHOLE) -> Tensor:
        """How much a generated token looks at the image, fp32 [B], from its attention weights [B, Hq, P]; ``visual``:
        bool [B, P]; ``heads``: what the heads here say to those in other processes, and hear from them."""

    @abstractmethod
    def entries(self, stored: int, generated: int) -> int:
        """How many of the ``stored`` entries of a reply stay as they are after ``generated`` tokens."""

    @abstractmethod
    def destinations(self, products: Tensor, saliency: Tensor, key: Tensor, count: int) -> Tensor:
        """What becomes of the n entries of a reply, of which ``count`` stay as they are.

        Args:
            products: inner products of the newest query with their keys, post-RoPE, not scaled, fp32 [B, Hq, n].
            saliency: fp32 [B, Hk, n], see :meth:`saliency`.
            key: [B, Hk, n, D], post-RoPE.

        Returns:
            int64 [B, Hk, n]: the entry that each one is added to, itself where it stays, -1 where it is dropped; as
            many stay in every row and head.
        """

    @abstractmethod
    def unseen(self, positions: Tensor) -> Tensor:
        """Which visual tokens the second path does not see, bool, for original positions, int64, of any shape."""

    @abstractmethod
    def contrasted(self, scores: Tensor, second: Tensor) -> Tensor:
        """Log-probabilities [B, V] of the next token, from the logits of the model and those of the second path."""
