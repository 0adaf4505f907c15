"""Scores of the chunks of a pruning stage in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_accel.kernels.hip_select.candidates import Keys, best_key, key_scores, levels


def stage_score_reference(
    representative: Tensor,
    keys: Keys,
    starts: Tensor,
    end: Tensor,
    chunk: int,
    exact: bool,
    level: Tensor | None = None,
) -> Tensor:
    """The best key found in each chunk, fp32 [B, H, n, m]; anything where a chunk is absent.

    Args:
        representative: the queries that stand for each query block, fp32 [B, H, n, R, D].
        keys: of H heads.
        starts: chunks, int64 [B, H, n, m].
        end: where the candidates of each query block end, int64 [B or 1, 1, n, 1].
        chunk: keys of a chunk, a power of two.
        exact: whether every key is read, of chunks that all end before ``end``; otherwise two keys of each half that
            lies on the way down, whose better half is followed.
        level: what is taken off the products of each representative, fp32 [B, H, n, R], or None.
    """
    if exact:
        return best_key(representative, keys, starts, chunk, level)
    return _bisect(representative, keys, starts, end, chunk, level)


def _bisect(
    representative: Tensor, keys: Keys, starts: Tensor, end: Tensor, chunk: int, level: Tensor | None
) -> Tensor:
    low, high = starts, torch.minimum(starts + chunk, end)
    score = torch.full(starts.shape, float("-inf"), dtype=torch.float32, device=starts.device)
    for _ in range(levels(chunk)):
        middle = (low + high) // 2
        both = torch.cat([(low + middle) // 2, (middle + high) // 2], dim=-1)
        left, right = key_scores(representative, keys, both, level).chunk(2, dim=-1)
        to_left = left >= right
        low, high = torch.where(to_left, low, middle), torch.where(to_left, middle, high)
        score = torch.maximum(score, torch.maximum(left, right))
    return score
