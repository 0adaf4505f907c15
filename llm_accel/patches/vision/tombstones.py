"""How a dropped visual token is marked: in band, so that beams, chunks and several images need no extra list.

The number of features must stay that of the placeholders in the prompt, so a dropped feature is replaced by a row that
no computation produces: infinity in the first channel, NaN in all others. The decoder's hook takes such rows out.
Should it be missing, every logit is NaN: the call fails in plain sight instead of answering without the image.

Where more tokens of an image stay than its budget, the first tombstone says how many a later stage must take out: two
digits in the third and fourth channel, which all floating point types hold exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BASE = 128


def buried(features: Tensor, kept: Tensor, surplus: int = 0) -> Tensor:
    """``features`` [n, C] with a tombstone in each row where ``kept``, bool [n], is False. The first one tells the
    ``surplus``, below 16384, where that is not 0."""
    stone = torch.full_like(features[:1], float("nan"))
    stone[:, 0] = float("inf")
    marked = torch.where(kept[:, None], features, stone)
    if surplus:
        first = int((~kept).long().argmax())
        marked[first, 2], marked[first, 3] = divmod(surplus, _BASE)
    return marked


def tombstones(embeddings: Tensor) -> Tensor:
    """bool [B, T]: which rows of [B, T, C] are tombstones."""
    return embeddings[..., 0].isinf() & embeddings[..., 1].isnan()


def surplus_of(embeddings: Tensor, gone: Tensor) -> Tensor:
    """int64 [B]: what the tombstones ``gone``, bool [B, T], of each row tell in all."""
    digits = embeddings[..., 2:4].float().nan_to_num(0.0).masked_fill(~gone[..., None], 0.0).sum(1).long()
    return digits[:, 0] * _BASE + digits[:, 1]
