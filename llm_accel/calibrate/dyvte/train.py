"""Trains the routers of all layers on features that were recorded once; the model itself is not needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_accel.common.progress import iterate
from llm_accel.methods.visual.exit_profile import RouterScore

STEPS = 300
BATCH = 128
RATE = 0.5  # of AdamW over the inputs of a matrix: the 6e-5 of the paper where C = 4096
WARM_UP = 0.03
KEPT_BACK = 5  # every fifth sample judges the routers and trains none

Matrices = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Trained:
    """Routers and their scores.

    Attributes:
        weights: layer -> (W1 [r, 2 C], W2 [2, r]), bfloat16.
        scores: per layer, on the held-out samples.
        routed: on those samples, (share whose first exit was safe, mean layer of that exit); a sample without an exit
            counts as safe, at the last layer. None without such samples.
    """

    weights: dict[int, Matrices]
    scores: tuple[RouterScore, ...]
    routed: tuple[float, float] | None


def train_routers(
    features: Tensor,
    safe: Tensor,
    layers: Sequence[int],
    dim: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> Trained:
    """Cross entropy per layer, seeded; every fifth sample is held out where there are that many.

    Args:
        features: [N, K, 2 C] of K layers.
        safe: bool [N, K], the labels.
        layers: indices of these layers.
        dim: width r of a router.
    """
    count = len(features)
    back = torch.arange(count) % KEPT_BACK == KEPT_BACK - 1
    weights: dict[int, Matrices] = {}
    votes = torch.zeros_like(safe)
    for place, layer in enumerate(iterate(layers, "router")):
        inside, labels = features[:, place].float(), safe[:, place]
        pair = _fit(inside[~back].to(device), labels[~back].to(device), dim, seed + layer)
        weights[layer] = (pair[0].bfloat16().cpu(), pair[1].bfloat16().cpu())
        votes[:, place] = router_votes(weights[layer], inside)
    scores = tuple(_score(layer, votes[back, k], safe[back, k]) for k, layer in enumerate(layers)) if back.any() else ()
    return Trained(weights, scores, _routed(votes[back], safe[back], layers) if back.any() else None)


def router_votes(weights: Matrices, features: Tensor) -> Tensor:
    """bool [N]: for which features [N, 2 C] a router decides to exit."""
    logits = F.linear(F.gelu(F.linear(features, weights[0].float())), weights[1].float())
    return logits[:, 1] > logits[:, 0]


def _fit(features: Tensor, safe: Tensor, dim: int, seed: int) -> Matrices:
    """W1 and W2, fp32, of one layer. Channels of hidden states differ in size by orders of magnitude, so features are
    scaled for training and the scale is put into W1. Without a single safe sample W2 stays zero, which never exits."""
    generator = torch.Generator().manual_seed(seed)
    size = features.square().mean(0).sqrt().clamp(min=1e-6)
    scaled, width = features / size, features.shape[1]
    first, last = _xavier(dim, width, generator), _xavier(2, dim, generator)
    if not bool(safe.any()):
        return first, torch.zeros_like(last)
    first, last = (weight.to(features.device).requires_grad_() for weight in (first, last))
    rates = [min(1e-2, RATE / weight.shape[1]) for weight in (first, last)]
    groups = [{"params": [weight], "lr": rate} for weight, rate in zip((first, last), rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    warm_up = max(1, round(WARM_UP * STEPS))
    for step in range(STEPS):
        pick = torch.randint(len(safe), (min(BATCH, len(safe)),), generator=generator).to(features.device)
        fall = 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (STEPS - warm_up)))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * ((step + 1) / warm_up if step < warm_up else fall)
        loss = F.cross_entropy(F.linear(F.gelu(F.linear(scaled[pick], first)), last), safe[pick].long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return first.detach() / size, last.detach()


def _xavier(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.nn.init.xavier_uniform_(torch.empty(rows, columns), generator=generator)


def _score(layer: int, votes: Tensor, safe: Tensor) -> RouterScore:
    right, exits, good = int((votes & safe).sum()), int(votes.sum()), int(safe.sum())
    return RouterScore(
        layer=layer,
        base_rate=round(good / len(safe), 6),
        exits=round(exits / len(safe), 6),
        precision=round(right / exits, 6) if exits else None,
        recall=round(right / good, 6) if good else None,
    )


def _routed(votes: Tensor, safe: Tensor, layers: Sequence[int]) -> tuple[float, float]:
    """Scores of the routers together: see :class:`Trained`."""
    padded = F.pad(votes, (0, 1), value=True)
    exits = padded.long().argmax(-1)
    kept = F.pad(safe, (0, 1), value=True).gather(1, exits[:, None])[:, 0]
    places = torch.tensor([*layers, layers[-1] + 1])[exits]
    return round(float(kept.float().mean()), 6), round(float(places.float().mean()), 6)
