"""What reaches the layers of the language model: rows of each, their arithmetic, and which patches are among them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


def prefill_flops(model: Any, rows: Sequence[int]) -> int | None:
    """Floating-point operations of the decoder layers on a prompt of which layer i sees ``rows[i]`` rows.

    Two for each weight of a layer's linear maps and each row; for attention, two products of ``head_dim`` terms for
    each head, row and row before it or itself. Norms, rotary phases and the output head are left out; sparse attention
    is counted as dense. None for mixtures of experts, whose rows do not use all weights.
    """
    config = model.get_decoder().config
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    total = 0
    for layer, n in zip(model.get_decoder().layers, rows, strict=True):
        weights = sum(part.weight.numel() for part in layer.modules() if isinstance(part, nn.Linear))
        total += 2 * weights * n + 4 * config.num_attention_heads * head_dim * (n * (n + 1) // 2)
    return total


def mean_flops(model: Any, lengths: Sequence[int], gone: Sequence[int]) -> int | None:
    """Mean of :func:`prefill_flops` over prompts of ``lengths`` tokens, of which ``gone[i]`` do not reach layer i."""
    counts = [n for length in lengths if (n := prefill_flops(model, [length - rows for rows in gone])) is not None]
    return round(sum(counts) / len(counts)) if counts else None


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
