"""How a dropped visual token is marked: in band, so that beams, chunks and several images need no list beside it.

The number of features must stay that of the placeholders in the prompt, so a dropped feature is replaced by a row that
no computation produces: infinity in the first channel, NaN in all others. The decoder's hook takes such rows out.
Should it be missing, every logit is NaN: the call fails in plain sight instead of answering without the image.
"""

from __future__ import annotations

import torch
from torch import Tensor


def buried(features: Tensor, kept: Tensor) -> Tensor:
    """``features`` [n, C] with a tombstone in each row where ``kept``, bool [n], is False."""
    stone = torch.full_like(features[:1], float("nan"))
    stone[:, 0] = float("inf")
    return torch.where(kept[:, None], features, stone)


def tombstones(embeddings: Tensor) -> Tensor:
    """bool [B, T]: which rows of [B, T, C] are tombstones."""
    return embeddings[..., 0].isinf() & embeddings[..., 1].isnan()
