"""The stock model whose attention hides by hand what a report says was evicted; its own attention otherwise."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from llm_accel.report import Report
from tests.contracts.head_oracle import HeadOracle
from tests.contracts.oracle import visible_columns
from tests.contracts.plain_attention import attention_output, attention_weights, running

# (layer, rows, KV heads, queries, columns) -> bool [B, H, T or 1, P]: what is shown, causality aside; None: everything
Shown = Callable[[int, int, int, int, int], Tensor | None]
Kept = dict[int, Tensor]


class HidingAttention:
    """The eager attention of the model's own file, softcaps, sinks and biases included, under a mask per head. Which
    layer and which heads of the cache a key belongs to is seen from the key itself, since models share, loop over and
    reorder them. ``shown`` is set anew before each call of the model."""

    def __init__(self) -> None:
        self.shown: Shown | None = None
        self.cached: dict[int, Tensor] = {}  # layer -> keys [B, Hk, P, D] that it handed out last, the last one last
        self.new = 0  # of these, the newest: those of the running call, of which a later layer may ask the last alone

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        shown = None if self.shown is None or not self.cached else self._shown(self.shown, query, key)
        if shown is not None:
            hidden = torch.zeros(shown.shape, dtype=query.dtype).masked_fill(~shown, torch.finfo(query.dtype).min)
            mask = hidden if attention_mask is None else hidden + attention_mask[..., : key.shape[2]]
            attention_mask = mask.clamp(min=torch.finfo(query.dtype).min)
        own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        if own is not None:
            return own(module, query, key, value, attention_mask, **kwargs)
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        weights = attention_weights(query, key, attention_mask, None, kwargs | {"scaling": scaling})
        return attention_output(weights, value), None

    def handed_out(self, layer: int, keys: Tensor, new: int) -> None:
        """Notes what a cache layer returned when it was given ``new`` tokens."""
        self.new = new
        self.cached.pop(layer, None)
        self.cached[layer] = keys

    def _shown(self, rule: Shown, query: Tensor, key: Tensor) -> Tensor | None:
        """bool [B, Hq, T or 1, P] for the query heads."""
        layer, heads = self._source(key)
        cached = key.shape[1] if heads is None else self.cached[layer].shape[1]
        shown = rule(layer, query.shape[0], cached, self.new, key.shape[2])
        if shown is None:
            return None
        if heads is not None and shown.shape[1] > 1:
            shown = shown[:, heads]
        return shown.repeat_interleave(query.shape[1] // shown.shape[1], 1)

    def _source(self, key: Tensor) -> tuple[int, list[int] | None]:
        """The layer that holds these keys, and for each head the head there; None where keys are made from what the
        layer holds, as from latents."""
        for layer, cached in reversed(self.cached.items()):
            if cached.shape[2:] != key.shape[2:] or cached.shape[0] != key.shape[0]:
                continue
            if key.shape == cached.shape and torch.equal(key, cached):
                return layer, list(range(key.shape[1]))
            same = [[torch.equal(key[:, h], cached[:, c]) for c in range(cached.shape[1])] for h in range(key.shape[1])]
            if all(map(any, same)):
                return layer, [row.index(True) for row in same]
        return next(reversed(self.cached)), None


@contextmanager
def hiding(model: PreTrainedModel, attention: HidingAttention) -> Iterator[None]:
    """Runs a stock model with this attention, which is told what each cache layer handed out last."""
    update = Cache.update

    def told(cache: Cache, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        handed = update(cache, key, value, layer_idx, *args, **kwargs)
        attention.handed_out(layer_idx, handed[0], key.shape[2])
        return handed

    Cache.update = told
    try:
        with running(model, attention):
            yield
    finally:
        Cache.update = update


def kept_now(report: Report) -> Kept:
    """Layer -> positions kept, [B, Hk, n], of the layers that a report names."""
    return {layer.layer: layer.kept for layer in report.layers if layer.kept is not None}


@dataclass(frozen=True)
class PromptKept:
    """What stays visible once the prompt is compressed: the kept columns of the prompt and all that came after."""

    kept: Kept
    prompt: int
    lengths: tuple[int, ...]

    def __call__(self, layer: int, rows: int, heads: int, queries: int, columns: int) -> Tensor | None:
        if layer not in self.kept or columns <= self.prompt:
            return None
        shown = visible_columns(self.kept[layer], self.prompt, self.lengths)
        return nn.functional.pad(shown, (0, columns - self.prompt), value=True)[:, :, None]


@dataclass(frozen=True)
class SplitHeads:
    """What heads see that keep a stream of recent entries, by the rule of the method alone."""

    oracle: HeadOracle

    def __call__(self, layer: int, rows: int, heads: int, queries: int, columns: int) -> Tensor | None:
        return self.oracle.shown(layer, rows, heads, queries, columns) if layer in self.oracle.layers else None


@dataclass(frozen=True)
class StepKept:
    """What one call sees of a cache that evicts at every step: entries kept before it, and its own tokens.

    Attributes:
        before: kept after the call before.
        after: kept after this call where the method evicts before it attends; an entry must be in both. None: it
            attends first.
        prompt: columns of the prompt.
        lengths: real tokens of its rows.
    """

    before: Kept
    after: Kept | None
    prompt: int
    lengths: tuple[int, ...]

    def __call__(self, layer: int, rows: int, heads: int, queries: int, columns: int) -> Tensor | None:
        if layer not in self.before or columns == queries:
            return None
        shown = self._columns(self.before[layer], columns)
        if self.after is not None and layer in self.after:
            shown &= self._columns(self.after[layer], columns)
        shown[..., columns - queries :] = True
        return shown[:, :, None]

    def _columns(self, kept: Tensor, columns: int) -> Tensor:
        seen: Sequence[int] = [length + columns - self.prompt for length in self.lengths]
        return visible_columns(kept, columns, tuple(seen))
