"""Prompts read a few at a time into one compressed cache, so that reading them does not bound how many are decoded."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicSlidingWindowLayer

from llm_accel.cache.joining import joined
from llm_accel.cache.stock import is_full
from llm_accel.errors import ConfigError, UnsupportedCallError
from llm_accel.patches.cache_name import CACHE
from llm_accel.patches.hook import DecoderHook, attach_session
from llm_accel.patches.plan import Plan
from llm_accel.patches.replay import ReadCache
from llm_accel.patches.rows import join_layer

Prompts = Tensor | Sequence[Tensor]
Rows = int | Sequence[int]
_SHARED = "share a prefill with other methods"
_WHAT = {
    "prefill": "read prompts a few at a time",
    "compress": "compress a context by itself",
    "record": _SHARED,
    "resume": _SHARED,
}


def prefill(
    model: Any, hook: DecoderHook, prompts: Prompts, mask: Tensor | None, rows: Rows, protect: Tensor | None
) -> ReadCache:
    """See :meth:`llm_accel.Handle.prefill`."""
    refuse(model, hook, "prefill", why_whole(hook.plan, model.get_decoder().config))
    ids, mask = padded(prompts, mask, model.get_input_embeddings().weight.device)
    if protect is not None and tuple(protect.shape) != tuple(ids.shape):
        raise ConfigError(f"protect_mask is {tuple(protect.shape)}; give a bool tensor {tuple(ids.shape)}.")
    hook.plan.check_lengths(mask.sum(-1))
    outcomes: list[Tensor | None] = []
    parts: list[list[Any]] = []
    for part in _parts(rows, ids.shape[0]):
        real = slice(int(mask[part].long().argmax(-1).min()), None)  # columns that are padding in these rows stay out
        cache = DynamicCache()
        session = attach_session(cache, hook.plan, model.get_decoder().config)
        session.reading = True
        _read(model, ids[part, real], mask[part, real], cache, None if protect is None else protect[part, real])
        outcomes.append(session.outcome)
        parts.append(list(cache.layers))
    whole, length = ReadCache(ids, mask), ids.shape[1]
    session = attach_session(whole, hook.plan, model.get_decoder().config)
    for index, layer in enumerate(whole.layers):
        join_layer(hook.plan, layer, [part[index] for part in parts], length, lambda method, _: method.capacity(length))
        for layers in parts:
            layers[index] = None  # its memory is free before the next layer is joined
    whole.outcome = joined(outcomes, -1, 0)
    hook.settle(session)
    return whole


def compress(
    model: Any, hook: DecoderHook, context: Prompts, mask: Tensor | None, protect: Tensor | None
) -> DynamicCache:
    """See :meth:`llm_accel.Handle.compress`."""
    refuse(model, hook, "compress", why_kept(hook.plan))
    ids, mask = padded(context, mask, model.get_input_embeddings().weight.device, "compress")
    cache = DynamicCache()
    attach_session(cache, hook.plan, model.get_decoder().config)
    _read(model, ids, mask, cache, protect)
    return cache


def _read(model: Any, ids: Tensor, mask: Tensor, cache: DynamicCache, protect: Tensor | None) -> None:
    """Has ``generate`` read a prompt, which prepares it as the model wants it, and nothing after it."""
    model.generate(
        ids,
        attention_mask=mask,
        protect_mask=protect,
        max_new_tokens=1,
        **{CACHE: cache, "do_sample": False, "num_beams": 1, "num_return_sequences": 1},
    )


def _parts(rows: Rows, batch: int) -> list[slice]:
    """The rows that are read in each call."""
    if isinstance(rows, int):
        if rows < 1:
            raise ConfigError(f"rows={rows!r} is not allowed; give an integer of at least 1.")
        return [slice(first, first + rows) for first in range(0, batch, rows)]
    sizes = list(rows)
    if sum(sizes) != batch or min(sizes) < 1:
        raise ConfigError(f"rows={sizes} is not allowed; give integers of at least 1 that sum to {batch}, the prompts.")
    return [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]


def padded(
    prompts: Prompts, mask: Tensor | None, device: torch.device, caller: str = "prefill"
) -> tuple[Tensor, Tensor]:
    """Token ids and mask [B, n], padded on the left; ``caller`` is who was given them, for messages.

    Raises:
        ConfigError: these are no prompts, or the mask is not one of theirs.
    """
    if not isinstance(prompts, Tensor):
        rows = list(prompts)
        if not rows or not all(isinstance(row, Tensor) and row.ndim == 1 and row.numel() for row in rows):
            raise ConfigError(f"{caller}: give token ids [batch, tokens], or a list of 1-D tensors that are not empty.")
        if mask is not None:
            raise ConfigError(f"{caller}: a list of prompts needs no attention_mask; leave it out.")
        longest = max(len(row) for row in rows)
        ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows]).to(device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        return ids, (torch.arange(longest, device=device) >= (longest - lengths)[:, None]).long()
    if prompts.ndim != 2 or not prompts.numel():
        raise ConfigError(f"{caller}: input_ids are {tuple(prompts.shape)}; give token ids [batch, tokens].")
    ids = prompts.to(device)
    mask = torch.ones_like(ids) if mask is None else mask.to(device).long()
    if mask.shape != ids.shape or not bool(mask[:, -1].all()) or bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise ConfigError(
            f"{caller}: attention_mask must be {tuple(ids.shape)} with zeros on the left of each row only "
            "(tokenizer.padding_side = 'left')."
        )
    return ids, mask


def why_kept(plan: Plan) -> str | None:
    """Why reading a prompt leaves all of its entries in the cache, or None."""
    if plan.kv_method is None and plan.split is None:
        return "it evicts nothing"
    if plan.hides:
        return "it hides entries and evicts none"
    if plan.kv_method is not None and plan.kv_method.deferred:
        return "compress='deferred' evicts at the first decode step, and prompts must be compressed at once"
    return None


def why_whole(plan: Plan, config: Any) -> str | None:
    """Why prompts of a batch must be read in one call on a model of this configuration, or None."""
    if plan.visual or plan.grounds or plan.decoding is not None:
        return "it acts on visual tokens, and images cannot be divided among calls here"
    if plan.attention_method is not None:
        return "it keeps the whole cache and looks at the length of the whole batch"
    reason = None if plan.whole is not None else why_kept(plan)
    if reason is not None:
        return reason
    stock = [layer for layer in DynamicCache(config=config).layers if not is_full(layer)]
    others = {type(layer) for layer in stock if isinstance(layer, CacheLayerMixin)} - {DynamicSlidingWindowLayer}
    if others:
        names = ", ".join(sorted(kind.__name__ for kind in others))
        return f"what a {names} holds of one prompt cannot be joined with that of another"
    return None


def refuse(model: Any, hook: DecoderHook, caller: str, reason: str | None) -> None:
    """Raises :class:`UnsupportedCallError` where ``caller`` cannot work; ``reason``: why this method is not for it."""
    if not hook.enabled:
        raise UnsupportedCallError(f"{caller} inside disabled(): nothing would be compressed; call it outside.")
    if not hasattr(model, "generate"):
        raise UnsupportedCallError(f"{type(model).__name__} cannot generate; apply to the model with a language head.")
    if reason is not None:
        raise UnsupportedCallError(
            f"{hook.plan.title} cannot {_WHAT[caller]}: {reason}. Call model.generate with the whole batch."
        )
