"""What of a prompt reaches the layers of the language model: rows of each layer, and which patches are among them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def counting(model: Any) -> Iterator[list[int]]:
    """Rows of a prompt that each decoder layer computes, padding included; filled by the first call inside."""
    rows: list[int] = []
    layers = list(model.get_decoder().layers)

    def count(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(rows) < len(layers):
            rows.append((args[0] if args else kwargs["hidden_states"]).shape[1])

    hooks = [layer.register_forward_pre_hook(count, with_kwargs=True) for layer in layers]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


def kept_patches(layer: Any, ids: Tensor, mask: Tensor, image_token: int) -> list[list[float]] | None:
    """Of each row's visual tokens, the share of KV heads of a layer that hold it when the prompt is done.

    Args:
        layer: report of the layer, traced.
        ids: int64 [B, T], token ids of the prompt.
        mask: int64 [B, T], 0 for padding.
    """
    if layer.kept is None:
        return None
    found = []
    for row, kept in enumerate(layer.kept.cpu()):
        places = (ids[row] == image_token).nonzero()[:, 0] - int((mask[row] == 0).sum())
        held = torch.zeros(ids.shape[1] + 1)  # the last entry takes what is no position of the prompt
        outside = (kept < 0) | (kept >= ids.shape[1])  # nothing, or a token of the answer
        held.index_add_(0, torch.where(outside, ids.shape[1], kept).flatten(), torch.ones(kept.numel()))
        found.append((held[places.cpu()] / len(kept)).tolist())
    return found
