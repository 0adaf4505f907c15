"""The steps of a search by stages in plain torch: chunks enter, are scored, and the best of them are kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_accel.kernels.hip_select.candidates import (
    ABSENT,
    FIRST,
    SAMPLED,
    Keys,
    best_key,
    best_places,
    key_scores,
    levels,
)


def enter(
    kept: Tensor | None, then: Tensor | None, end: Tensor, chunk: int, part: int, sink: int, fresh: int
) -> Tensor:
    """The chunks of ``part`` keys that enter a stage, int64 [B, H, n, m * chunk / part + fresh], :data:`ABSENT` where
    there is none; ascending but for these.

    Args:
        kept: chunks of ``chunk`` keys that the stage before kept, int64 [B, H, n, m], which are cut into parts; None
            for the first stage, of which the result has one head.
        then: where the candidates ended when they were kept, int64 [B or 1, 1, n, 1]; what has become a candidate
            since enters too. None where that is now; in the first stage, everything after the sink enters.
        end: where the candidates end, as ``then``.
        sink: where they begin.
        fresh: chunks beside those of ``kept``, at least as many as there are.
    """
    begin, limit, found = torch.as_tensor(sink), end, []
    if then is not None:
        begin = sink + (then - sink) // part * part
        limit = torch.minimum(begin, end)
    if kept is not None:
        parts = (kept[..., None] + torch.arange(0, chunk, part, device=kept.device)).flatten(-2)
        found.append(parts.masked_fill(parts >= limit, ABSENT))
    if fresh:
        new = begin + torch.arange(0, fresh * part, part, device=end.device)
        new = torch.where(new < end, new, ABSENT)
        found.append(new if kept is None else new.expand(*kept.shape[:3], -1))
    return torch.cat(found, dim=-1)


def level(representative: Tensor, keys: Keys, end: Tensor, scaling: float) -> Tensor:
    """How high the products of each query stand with the keys before ``end``, fp32 [B, H, n, R]: the log-sum-exp of its
    attention, over ``scaling``, estimated from :data:`FIRST` keys, where attention rests, and :data:`SAMPLED` more.

    What is left of a product without it says how much of the query's attention a key gets, so that queries and heads
    with large products do not take the place of others.

    Args:
        representative: [B, H, n, R, D].
        keys: of H heads.
        end: where the candidates of each query block end, int64 [B or 1, 1, n, 1].
        scaling: softmax scale.
    """
    step, beyond = torch.arange(SAMPLED, device=end.device), (end - FIRST).clamp(min=1)
    first = torch.arange(FIRST, device=end.device).expand(*end.shape[:3], -1)
    positions = torch.cat([first, FIRST + step * beyond // SAMPLED], dim=-1)
    hidden = (positions >= end) & (positions > 0)
    weight = F.pad((beyond.float() / SAMPLED).log().expand(*end.shape[:3], SAMPLED), (FIRST, 0))
    weight = weight.masked_fill(hidden, float("-inf"))[..., None, :]  # [B or 1, 1, n, 1, FIRST + SAMPLED]
    index = keys.at(positions)
    read = keys.rows.index_select(0, index.flatten()).float().view(*index.shape, -1)
    logits = torch.matmul(representative.float(), read.transpose(-1, -2)).mul_(scaling).add_(weight)
    return logits.logsumexp(-1) / scaling


def score(
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
        representative: the queries that stand for each query block, [B, H, n, R, D].
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


def keep(score: Tensor, starts: Tensor, count: int) -> Tensor:
    """The ``count`` chunks with the best scores, int64 [B, H, n, count], ascending, absent ones last; the lower one
    where scores are equal.

    Args:
        score: fp32 [B, H, n, m].
        starts: chunks, int64 [B, H, n, m] with m above ``count``, ascending but for absent ones.
    """
    return starts.gather(-1, best_places(score, starts < ABSENT, count)).sort(dim=-1).values


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
