"""What all models with fewer visual tokens share: the method of an engine, scores from a tower, and what stays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal.parse import ImageEmbeddingItems

from llm_accel.errors import ConfigError
from llm_accel.integrations.vllm.checks import PRUNING
from llm_accel.integrations.vllm.settings import settings_of
from llm_accel.methods import TowerMerge, TowerTokens, VisualTokens

# transformers 5 saves the towers of CLIP and SigLIP without "vision_model."
PLAIN_TOWER = WeightsMapper(
    orig_to_new_prefix={
        f"{before}vision_tower.{part}": f"vision_tower.vision_model.{part}"
        for before in ("model.", "")
        for part in ("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.", "head.")
    }
)


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


def limits_without_videos(usual: Mapping[str, int | None], model_config: Any) -> dict[str, int | None]:
    """No videos beside a method: their frames would come in whole."""
    limits = dict(usual)
    if visual_method(model_config) is not None and "video" in limits:
        limits["video"] = 0
    return limits


def choose(
    method: VisualTokens, features: Sequence[Tensor], marks: Sequence[Tensor] | None, width: int
) -> tuple[list[Tensor], list[Tensor]]:
    """What stays of each image.

    Args:
        method: decides.
        features: rows of each image, [n, C], in raster order.
        marks: what is known of each row, fp32 [n, c]: its score, and what tells likeness, or NaN where a row ends a
            line of patches; None: nothing.
        width: channels that are merged where a method merges; further ones leave with their row.

    Returns:
        The rows that stay of each image, and which ones they are, int64, ascending.
    """
    rows, kept = [], []
    for index, one in enumerate(features):
        known = None if marks is None else marks[index]
        line = torch.zeros(len(one), dtype=torch.bool, device=one.device) if known is None else known[:, 0].isnan()
        patches = (~line).nonzero()[:, 0]
        scores = None if known is None or not isinstance(method, TowerTokens) else known[patches, 0]
        stay = patches[method.choose(len(patches), scores, one.device)]
        if len(stay) < len(patches):
            if isinstance(method, TowerMerge) and known is not None and scores is not None:
                parts = method.split(scores, len(stay))
                merged = method.merge(one[patches, :width], parts, known[patches, 1:])
                one = one.index_copy(0, patches, torch.cat([merged, one[patches, width:]], dim=1))
            chosen = line if method.newline == "keep" else torch.zeros_like(line)
            stay = chosen.index_fill(0, stay, True).nonzero()[:, 0]
        else:
            stay = torch.arange(len(one), device=one.device)
        rows.append(one[stay])
        kept.append(stay)
    return rows, kept
