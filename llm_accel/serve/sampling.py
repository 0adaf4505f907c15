"""Choice of the next token, each row of a batch by its own settings and its own random numbers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How one request wants its tokens chosen.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: the likeliest tokens that together reach this probability, in (0, 1].
        top_k: that many of the likeliest tokens; None for all.
        seed: the same seed gives the same random numbers, whatever else is in the batch; None for fresh ones.
        logprobs: how many alternatives to report for each token; None to report no probabilities.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    logprobs: int | None = None

    def source(self, index: int) -> random.Random:
        """The random numbers of answer number ``index``."""
        return random.SystemRandom() if self.seed is None else random.Random(f"{self.seed}/{index}")


def choose(logits: Tensor, settings: Sequence[Sampling], draws: Sequence[float]) -> Tensor:
    """The next token of each row, int64 [B].

    Args:
        logits: float [B, V].
        settings: one for each row.
        draws: one number in [0, 1) for each row, unused by greedy rows. The token is where the cumulative distribution
            of the tokens in question, likeliest first, passes it.
    """
    tokens = logits.argmax(-1)
    rows = [row for row, setting in enumerate(settings) if setting.temperature > 0]
    if not rows:
        return tokens
    device = logits.device
    chosen = [settings[row] for row in rows]
    column = torch.tensor(
        [
            (setting.temperature, setting.top_p, min(setting.top_k or logits.shape[-1], logits.shape[-1]), draws[row])
            for setting, row in zip(chosen, rows, strict=True)
        ],
        dtype=torch.float64,
        device=device,
    )
    temperature, top_p, top_k, draw = column[:, :, None].unbind(1)
    behind = logits[rows].double() - logits[rows].amax(-1, keepdim=True)  # no temperature makes infinities of 0
    scaled, order = (behind / temperature).sort(dim=-1, descending=True, stable=True)
    likely = scaled.softmax(-1)
    before = likely.cumsum(-1) - likely
    rank = torch.arange(likely.shape[-1], device=device)
    inside = (before < top_p) & (rank < top_k)
    inside[:, 0] = True
    reached = (likely * inside).cumsum(-1)
    place = torch.searchsorted(reached, draw * reached[:, -1:], right=True)
    place = place.minimum(inside.sum(-1, keepdim=True) - 1)
    tokens[rows] = order.gather(-1, place)[:, 0]
    return tokens
