"""From scores on tensors to the profile of a model."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from llm_accel.common.environment import packages
from llm_accel.methods.kv.head_profile import Head, HeadProfile, Scores
from llm_accel.patches.heads import model_heads
from llm_accel.patches.identity import config_hash, weight_hash

_DIGITS = 6


def kv_scores(scores: Tensor, kv_heads: int) -> Tensor:
    """Query-head scores [L, Hq] as KV-head scores [L, Hk]: the maximum of each group."""
    return scores.view(scores.shape[0], kv_heads, -1).amax(-1)


def make_profile(
    model: Any,
    name: str,
    method: str,
    *,
    scores: Tensor,
    echo: Tensor | None = None,
    circuit: list[Head] | None = None,
    n_instances: int,
    seed: int,
    settings: dict[str, Any],
) -> HeadProfile:
    """The profile of ``model`` from query-head scores [L, Hq], and echo scores of the same shape."""
    heads = model_heads(model)
    return HeadProfile(
        model=name,
        method=method,
        q_head_scores=_plain(scores),
        kv_head_scores=_plain(kv_scores(scores, heads.kv_heads)),
        echo_scores=() if echo is None else _plain(kv_scores(echo, heads.kv_heads)),
        circuit=None if circuit is None else tuple(circuit),
        n_instances=n_instances,
        seed=seed,
        config_hash=config_hash(model),
        weights_hash=weight_hash(model),
        versions=packages(),
        settings=settings,
    )


def _plain(scores: Tensor) -> Scores:
    return tuple(tuple(round(value, _DIGITS) for value in row) for row in scores.double().tolist())
