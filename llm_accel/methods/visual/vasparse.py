"""VASparse: decoding against visual hallucination with a sparse view of the answer (arXiv 2501.06553).

A decode step with query q over the entries K_i of an answer of L tokens:

    selection   delta_i = <q, K_i>^2 + lam P_i;  the top keep * L stay, each cluster of the others becomes one entry
                P = softmax over i of the attention that token i paid to the image
    penalty     (1 + beta) s_j - beta w_j s_j on the attention logits s;  w = softmax over j of the attention received
    contrast    (1 + alpha) logits - alpha logits_phi,  phi = language model head on the embedding of the newest token
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from llm_accel.kernels import column_votes
from llm_accel.kernels.dispatch import Problem
from llm_accel.methods.base import ENTRIES, MethodConfig, MethodInfo, option
from llm_accel.methods.claims import Claim
from llm_accel.methods.selection import select_top, uniform
from llm_accel.methods.shard import WHOLE, HeadShard
from llm_accel.methods.visual.clusters import cluster_centres


@dataclass(frozen=True)
class VASparse(MethodConfig):
    """Aims at fewer hallucinations, not at speed. ``alpha=0``, ``beta=0`` and ``keep=1`` switch its three parts off.

    It acts on decode steps after a prompt with visual tokens. The prompt itself is computed and kept as it is, and one
    without an image is left alone."""

    alpha: float = option("weight of the contrast with the second path; 0: no contrast", 0.1, most=100.0, least=0)
    beta: float = option(
        "weight of the penalty on entries that attract attention; 0: no penalty", 0.1, most=100.0, least=0
    )
    lam: float = option(
        "weight of the attention paid to the image against that of the newest query; 0: none", 0.1, most=1e6, least=0
    )
    keep: float = option("fraction of the generated tokens kept as they are, in (0, 1]; 1: all", 0.9, share="(0, 1]")
    merge: int | None = option(
        "discarded tokens per entry that they are summed into; None: they are dropped", 10, most=ENTRIES, least=1
    )
    mask_rate: float = option(
        "share of the visual tokens that the second path does not see, in [0, 1]", 0.5, share="[0, 1]"
    )
    plausibility: float = option(
        "minimum probability of a token relative to the likeliest one, in [0, 1]; 0: any", 0.1, share="[0, 1]"
    )
    prune_every: int = option("generated tokens between two selections", 16, most=ENTRIES, least=1)
    protect_last: int = option("newest tokens that always stay", 4, most=ENTRIES, least=0)
    sink_window: int | None = option(
        "last queries of a prompt that count as attention received; None: all", 32, most=ENTRIES, least=1
    )
    saliency_head: Literal["last", "mean"] = option("attention to the image: of the last head, or the mean", "last")
    seed: int = option("which visual tokens the second path does not see", 0)

    name: ClassVar[str] = "vasparse"
    info: ClassVar[MethodInfo] = MethodInfo(
        "VASparse, arXiv 2501.06553", "KV cache of the answer; against hallucination, not for speed", kinds=("vision",)
    )

    @property
    def penalises(self) -> bool:
        """Whether attention of decode steps is computed in another way."""
        return self.beta > 0

    @property
    def prunes(self) -> bool:
        """Whether entries of generated tokens leave the cache."""
        return self.keep < 1

    @property
    def contrasts(self) -> bool:
        """Whether the logits are contrasted with those of a second path."""
        return self.alpha > 0

    @property
    def attends(self) -> bool:
        """Whether there is anything to do in the layers."""
        return self.penalises or self.prunes

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
        if not self.penalises:
            return {}
        return {"scores": column_votes.OP.explain(problem), "decode": ("torch", "logits are penalised before softmax")}

    def penalised(self, logits: Tensor, received: Tensor, real: Tensor) -> Tensor:
        """Attention logits of one decode step after the penalty.

        Args:
            logits: scaled, finite, fp32 [B, Hq, P].
            received: attention that each entry got from earlier queries, summed, fp32 [B, Hq, P].
            real: bool [B or 1, 1, P], which slots are no padding.
        """
        sink = received.masked_fill(~real, float("-inf")).softmax(-1)
        return (1.0 + self.beta) * logits - self.beta * sink * logits

    def saliency(self, weights: Tensor, visual: Tensor, heads: HeadShard = WHOLE) -> Tensor:
        """Attention that a generated token pays to the image, fp32 [B], from its weights [B, Hq, P]; ``visual``: bool
        [B, P]."""
        paid = heads.every((weights * visual[:, None]).sum(-1))
        return paid[:, -1] if self.saliency_head == "last" else paid.mean(1)

    def entries(self, stored: int, generated: int) -> int:
        """How many of the ``stored`` entries of an answer stay as they are after ``generated`` tokens."""
        if generated % self.prune_every:
            return stored
        return min(stored, max(self.protect_last, math.ceil(self.keep * generated - 1e-9)))

    def importance(self, products: Tensor, saliency: Tensor) -> Tensor:
        """delta of each entry, fp32 [B, Hk, n], mean over the query heads that share a KV head."""
        (batch, heads, stored), squared = saliency.shape, products.square()
        return squared.view(batch, heads, -1, stored).mean(2) + self.lam * saliency.softmax(-1)

    def destinations(self, products: Tensor, saliency: Tensor, key: Tensor, count: int) -> Tensor:
        """What becomes of the n entries of an answer, of which ``count`` stay as they are.

        Args:
            products: inner products of the newest query with their keys, post-RoPE, not scaled, fp32 [B, Hq, n].
            saliency: fp32 [B, Hk, n], see :meth:`saliency`.
            key: [B, Hk, n, D], post-RoPE.

        Returns:
            int64 [B, Hk, n]: the entry that each one is added to, itself where it stays, -1 where it is dropped; as
            many stay in every row and head.
        """
        batch, heads, stored, dim = key.shape
        index = torch.arange(stored, device=key.device)
        newest = (index >= stored - self.protect_last)[None]
        every = torch.ones_like(newest)
        counts = torch.full((batch,), count, device=key.device)
        kept = select_top(self.importance(products, saliency), counts, count, every, forced=newest)
        into = torch.full((batch, heads, stored), -1, device=key.device).scatter(2, kept, kept)
        if self.merge is None:
            return into
        rest = index.expand_as(into)[into < 0].view(batch, heads, stored - count)
        features = key.gather(2, rest[..., None].expand(-1, -1, -1, dim))
        centres = cluster_centres(features, math.ceil(rest.shape[2] / self.merge))
        return into.scatter(2, rest, rest.gather(2, centres))

    def unseen(self, positions: Tensor) -> Tensor:
        """Which visual tokens the second path does not see, bool, for original positions, int64, of any shape."""
        return uniform(positions, torch.tensor(self.seed, device=positions.device)) < self.mask_rate

    def contrasted(self, scores: Tensor, second: Tensor) -> Tensor:
        """Log-probabilities [B, V] of the next token, from the logits of the model and those of the second path."""
        contrast = (1.0 + self.alpha) * scores - self.alpha * second
        if self.plausibility > 0:
            least = scores.amax(-1, keepdim=True) + math.log(self.plausibility)
            contrast = contrast.masked_fill(scores < least, float("-inf"))
        return contrast.log_softmax(-1)  # beams add these up, so every row must be a distribution
