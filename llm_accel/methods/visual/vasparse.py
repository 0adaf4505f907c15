"""VASparse: decoding against visual hallucination with a sparse view of the reply (arXiv 2501.06553).

A decode step with query q over the entries K_i of a reply of L tokens:

    selection   delta_i = <q, K_i>^2 + lam P_i;  the top keep * L stay, each cluster of the others becomes one entry
                P = softmax over i of the attention that token i paid to the image
    penalty     (1 + beta) s_j - beta w_j s_j on the attention logits s;  w = softmax over j of the attention received
    contrast    (1 + alpha) logits - alpha logits_phi,  phi = language model head on the embedding of the newest token
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from llm_accel.kernels import column_votes
from llm_accel.kernels.dispatch import Problem
from llm_accel.methods.base import ENTRIES, MethodInfo, option
from llm_accel.methods.selection import select_top, uniform
from llm_accel.methods.shard import WHOLE, HeadShard
from llm_accel.methods.visual.clusters import cluster_centres
from llm_accel.methods.visual.reply import ReplyDecoding


@dataclass(frozen=True)
class VASparse(ReplyDecoding):
    """Aims at fewer hallucinations, not at speed. ``alpha=0``, ``beta=0`` and ``keep=1`` switch its three parts off."""

    alpha: float = option("weight of the contrast with the second path; 0: no contrast", 0.1, most=100.0, least=0)
    beta: float = option(
        "weight of the penalty on entries that draw attention; 0: no penalty", 0.1, most=100.0, least=0
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
        "least probability of a token against the likeliest one, in [0, 1]; 0: any", 0.1, share="[0, 1]"
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
        "VASparse, arXiv 2501.06553", "KV cache of the reply; against hallucination, not for speed", kinds=("vision",)
    )

    @property
    def penalises(self) -> bool:
        return self.beta > 0

    @property
    def prunes(self) -> bool:
        return self.keep < 1

    @property
    def contrasts(self) -> bool:
        return self.alpha > 0

    @property
    def observed_queries(self) -> int | None:
        return self.sink_window

    def backends(self, problem: Problem) -> dict[str, tuple[str, str]]:
        if not self.penalises:
            return {}
        return {"scores": column_votes.OP.explain(problem), "decode": ("torch", "logits are penalised before softmax")}

    def penalised(self, logits: Tensor, received: Tensor, real: Tensor) -> Tensor:
        sink = received.masked_fill(~real, float("-inf")).softmax(-1)
        return (1.0 + self.beta) * logits - self.beta * sink * logits

    def saliency(self, weights: Tensor, visual: Tensor, heads: HeadShard = WHOLE) -> Tensor:
        paid = heads.every((weights * visual[:, None]).sum(-1))
        return paid[:, -1] if self.saliency_head == "last" else paid.mean(1)

    def entries(self, stored: int, generated: int) -> int:
        if generated % self.prune_every:
            return stored
        return min(stored, max(self.protect_last, math.ceil(self.keep * generated - 1e-9)))

    def importance(self, products: Tensor, saliency: Tensor) -> Tensor:
        """delta of each entry, fp32 [B, Hk, n], mean over the query heads that share a KV head."""
        (batch, heads, stored), squared = saliency.shape, products.square()
        return squared.view(batch, heads, -1, stored).mean(2) + self.lam * saliency.softmax(-1)

    def destinations(self, products: Tensor, saliency: Tensor, key: Tensor, count: int) -> Tensor:
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
        return uniform(positions, torch.tensor(self.seed, device=positions.device)) < self.mask_rate

    def contrasted(self, scores: Tensor, second: Tensor) -> Tensor:
        contrast = (1.0 + self.alpha) * scores - self.alpha * second
        if self.plausibility > 0:
            least = scores.amax(-1, keepdim=True) + math.log(self.plausibility)
            contrast = contrast.masked_fill(scores < least, float("-inf"))
        return contrast.log_softmax(-1)  # beams add these up, so every row must be a distribution
