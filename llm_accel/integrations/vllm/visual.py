"""What all models with fewer visual tokens share: the method of an engine, scores from a tower, and what stays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from vllm.multimodal.parse import ImageEmbeddingItems

from llm_accel.errors import ConfigError
from llm_accel.integrations.vllm.checks import PRUNING
from llm_accel.integrations.vllm.settings import settings_of
from llm_accel.methods import TowerMerge, TowerTokens, VisualTokens


def visual_method(model_config: Any) -> VisualTokens | None:
    """The visual method of an engine, from vLLM's configuration of its model, or None."""
    settings = settings_of(model_config)
    return None if settings is None else settings.visual


@contextmanager
def pruning() -> Iterator[None]:
    """The layers that are built inside belong to a model that prunes visual tokens, if a method is asked for."""
    token = PRUNING.set(True)
    try:
        yield
    finally:
        PRUNING.reset(token)


def check_tower(method: VisualTokens | None, vllm_config: Any, wrong: dict[str, bool]) -> None:
    """Refuses engines in which the attention of a vision tower cannot be looked at.

    Args:
        method: the method of the engine.
        vllm_config: its configuration.
        wrong: further reasons, and whether they hold.

    Raises:
        ConfigError: the message says why.
    """
    if not isinstance(method, TowerTokens):
        return
    reasons = {
        "tensor parallelism spreads the heads of the vision tower, and the scores are of all heads": (
            vllm_config.parallel_config.tensor_parallel_size > 1
        ),
        "the vision tower is compiled, which hides its attention; leave compile_mm_encoder out": (
            vllm_config.compilation_config.compile_mm_encoder
        ),
    }
    reason = next((reason for reason, holds in (reasons | wrong).items() if holds), None)
    if reason is not None:
        raise ConfigError(f"{method.spec()} cannot run in this engine: {reason}.")


def check_items(method: VisualTokens | None, items: Any) -> None:
    """Refuses a request that brings features in place of an image.

    Raises:
        ValueError: what vLLM's servers answer with status 400.
    """
    if method is None or "image" not in items:
        return
    if isinstance(items["image"], ImageEmbeddingItems):
        raise ValueError(f"{method.spec()} prunes images; this request brings their features. Send the image itself.")


def choose(
    method: VisualTokens, features: Sequence[Tensor], marks: Sequence[Tensor] | None, width: int
) -> tuple[list[Tensor], list[Tensor]]:
    """What stays of each image.

    Args:
        method: decides.
        features: rows of each image, [n, C], in raster order.
        marks: what the tower knows of each row, fp32 [n, c]: its score, and what tells likeness; None: nothing.
        width: channels that are merged where a method merges; further ones leave with their row.

    Returns:
        The rows that stay of each image, and which ones they are, int64, ascending.
    """
    rows, kept = [], []
    for index, one in enumerate(features):
        known = None if marks is None else marks[index]
        stay = method.choose(len(one), None if known is None else known[:, 0], one.device)
        if isinstance(method, TowerMerge) and known is not None and len(stay) < len(one):
            parts = method.split(known[:, 0], len(stay))
            one = torch.cat([method.merge(one[:, :width], parts, known[:, 1:]), one[:, width:]], dim=1)
        rows.append(one[stay])
        kept.append(stay)
    return rows, kept
