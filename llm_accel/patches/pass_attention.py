"""Attention of a pass over a context, piece by piece: each piece brings its log-sum-exp, so that a softmax over some of
them is known without computing the logits again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llm_accel.patches.attention_lse import with_lse
from llm_accel.patches.base_attention import ModelAttention


def attend_in_pieces(
    attention: ModelAttention, query: Tensor, key: Tensor, value: Tensor, seen: Sequence[slice]
) -> tuple[Tensor, Tensor] | None:
    """Dense attention of queries that come after a context and see all of it, and each other causally.

    Args:
        query: [B, Hq, q, D].
        key, value: [B, H, n + q, D] and [B, H, n + q, Dv]: the context, and behind it what belongs to the queries.
        seen: pieces of the context, ascending.

    Returns:
        The output, [B, q, Hq, Dv], and the log-sum-exp of the logits over the entries of ``seen`` and the queries' own,
        fp32 [B, Hq, q]; None where attention gives no log-sum-exp.
    """
    if attention.base != "sdpa" or any(attention.kwargs.get(name) is not None for name in _CHANGING):
        return None
    context = key.shape[2] - query.shape[2]
    own = _piece(attention, query, key, value, [slice(context, None)], is_causal=True)
    if own is None:
        return None
    pieces, rest = [own], _between(seen, context)
    for slices in (seen, rest):
        found = _piece(attention, query, key, value, slices, is_causal=False) if slices else None
        if found is None and slices:
            return None
        pieces += [found] if found is not None else []
    lse = torch.stack([piece[1] for piece in pieces])
    weights = (lse - lse.logsumexp(0)).exp_().transpose(2, 3)[..., None]  # [pieces, B, q, Hq, 1]
    output = torch.zeros((), device=query.device)
    for (part, _), weight in zip(pieces, weights, strict=True):
        output = torch.addcmul(output, part.float(), weight)
    return output.to(own[0].dtype), lse[: 1 + bool(seen)].logsumexp(0)


_CHANGING = ("softcap", "s_aux", "position_bias")  # arguments that make more of attention than a softmax of products


def _between(seen: Sequence[slice], end: int) -> list[slice]:
    """What ascending slices leave of ``range(end)``."""
    edges = [0, *(edge for piece in seen for edge in (piece.start, piece.stop)), end]
    return [slice(first, last) for first, last in zip(edges[::2], edges[1::2], strict=True) if first < last]


def _piece(
    attention: ModelAttention, query: Tensor, key: Tensor, value: Tensor, slices: Sequence[slice], is_causal: bool
) -> tuple[Tensor, Tensor] | None:
    """Output and log-sum-exp over some entries alone."""
    keys, values = (
        entries[:, :, slices[0]] if len(slices) == 1 else torch.cat([entries[:, :, part] for part in slices], dim=2)
        for entries in (key, value)
    )
    alone = ModelAttention(attention.base, attention.module, attention.kwargs | {"is_causal": is_causal})
    output, lse = with_lse(lambda: alone.plain(query, keys, values, None), query)
    return None if lse is None else (output, lse)
