"""Log-probabilities of the model itself: before penalties, temperature and cuts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from llm_accel.patches.cache_name import CACHE

_AT_ONCE = 1024  # tokens that are read in one call: the logits of a long prompt are never all there
_IMPOSSIBLE = -9999.0  # JSON knows no infinity; OpenAI writes this number


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probabilities of one token.

    Attributes:
        token: the token itself.
        logprob: its log-probability.
        top: the likeliest tokens in its place with theirs, as many as were asked for.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def token_logprobs(logits: Tensor, tokens: Tensor, top: int) -> list[TokenLogprob]:
    """Those of ``tokens``, int64 [N].

    Args:
        logits: float [N, V], from before each token.
        top: alternatives of each, at most V of them.
    """
    known = logits.float().log_softmax(-1).clamp_min(_IMPOSSIBLE)
    best = known.topk(min(top, known.shape[-1]))
    chosen = known.gather(-1, tokens[:, None])[:, 0]
    columns = (tokens.tolist(), chosen.tolist(), best.indices.tolist(), best.values.tolist())
    return [
        TokenLogprob(token, value, tuple(zip(ids, values, strict=True)))
        for token, value, ids, values in zip(*columns, strict=True)
    ]


def prompt_logprobs(model: Any, prompt: Sequence[int], top: int) -> Iterator[list[TokenLogprob | None]]:
    """Those of the tokens of a prompt, a part of it at a time, None for the first token, which nothing precedes;
    ``model`` is the dense one."""
    ids = torch.tensor(prompt, device=model.device)
    cache = DynamicCache(config=model.config)
    yield [None]
    for begin in range(0, len(ids) - 1, _AT_ONCE):
        chunk = ids[begin : min(begin + _AT_ONCE, len(ids) - 1)]
        with torch.no_grad():
            logits = model(input_ids=chunk[None], **{CACHE: cache}, use_cache=True).logits[0]
        yield [*token_logprobs(logits, ids[begin + 1 : begin + 1 + len(chunk)], top)]
