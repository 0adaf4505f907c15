"""Caches whose rows come and go: those of several prompts in one, and what is left when rows leave it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from llm_accel.cache import AccelLayer, GroupedLayer, SlotLayer
from llm_accel.cache.joining import joined
from llm_accel.cache.linear import join_states
from llm_accel.cache.stock import has_linear_state
from llm_accel.methods import StepEviction
from llm_accel.patches.eviction import step_view
from llm_accel.patches.hook import attach_session, session_of
from llm_accel.patches.plan import Plan


def kind_of(cache: Any, turns: bool = False) -> Hashable:
    """What must be equal in caches of one method that are to be joined: how many slots are overwritten. With ``turns``,
    where rows are taken out again for later turns, also which layers have evicted, which a layer knows of all its rows
    together."""
    layers = [layer for layer in cache.layers if isinstance(layer, AccelLayer)]
    stores = [store for layer in layers for store in _stores(layer)]
    evicted = [layer.compressed for layer in (*layers, *stores)] if turns else []
    return tuple(store.capacity for store in stores if isinstance(store, SlotLayer)), tuple(evicted)


def keeps_turns(plan: Plan) -> bool:
    """Whether a row that has shared a cache can go on alone: not where layers evict while they decode, of which each
    knows for all its rows together."""
    return plan.kv_method is None or plan.kv_method.cuts_every is None


def lengths_mix(plan: Plan) -> bool:
    """Whether prompts of different lengths that are read in one call give what each gives alone: not where slots are
    overwritten of which there are more after a longer prompt, since a layer has one number of them for all rows."""
    return not isinstance(plan.kv_method, StepEviction) or plan.kv_method.ratio is None


def join_running(config: Any, caches: Sequence[Any], length: int, spend: bool = True) -> DynamicCache:
    """The rows of caches of one :func:`kind_of`, all of them between decode steps, in one cache that has seen
    ``length`` tokens, as many as the longest of them or more. ``spend``: what is joined is taken out of ``caches``,
    layer by layer."""
    sessions = [session_of(cache) for cache in caches]
    plan = sessions[0].plan  # type: ignore[union-attr]
    for session in sessions:
        session.end_graph()  # type: ignore[union-attr]
    whole = DynamicCache()
    attach_session(whole, plan, config)
    for index, layer in enumerate(whole.layers):
        parts: list[Any] = [cache.layers[index] for cache in caches]
        join_layer(plan, layer, parts, length, lambda _, store: store.capacity)
        for cache in caches if spend else ():
            cache.layers[index] = None
    return whole


def keep_rows(cache: Any, rows: Sequence[int], padding: int) -> None:
    """Keeps ``rows`` of a cache, which may be repeated, and lets go of what only the others had: empty slots, and
    ``padding`` leading tokens that are padding in all that stay."""
    session = session_of(cache)
    assert session is not None
    session.end_graph()
    cache.batch_select_indices(torch.tensor(rows))
    for layer in cache.layers:
        if isinstance(layer, AccelLayer):
            layer.trim(padding)
        elif type(layer) is DynamicSlidingWindowLayer:
            _trim_window(layer, padding)


def _trim_window(layer: Any, padding: int) -> None:
    layer.cumulative_length -= padding
    seen = min(layer.cumulative_length, layer.sliding_window - 1)
    layer.keys, layer.values = layer.keys[:, :, -seen:], layer.values[:, :, -seen:]


def join_layer(
    plan: Plan,
    layer: Any,
    parts: Sequence[Any],
    length: int,
    capacity: Callable[[StepEviction, SlotLayer], int | None],
) -> None:
    """Fills an empty layer with the rows of ``parts``, padded to ``length`` tokens. ``capacity``: how many slots there
    are where a method overwrites them, as the first of the parts has them."""
    if type(layer) is DynamicSlidingWindowLayer:
        layer.lazy_initialization(parts[0].keys, parts[0].values)
        layer.keys = joined([part.keys for part in parts], -2, 0)
        layer.values = joined([part.values for part in parts], -2, 0)
        layer.cumulative_length = length
    elif isinstance(layer, AccelLayer):
        layer.join(parts, length)
        method = plan.kv_method if plan.split is None else plan.split.streaming
        for store, part in zip(_stores(layer), _stores(parts[0]), strict=True):
            if isinstance(store, SlotLayer) and isinstance(method, StepEviction) and store.physical_length():
                store.bound(capacity(method, part))
                if store.full:
                    store.choose_spare(method.victims(step_view(store)))
    elif has_linear_state(layer):
        join_states(layer, parts)


def _stores(layer: Any) -> list[Any]:
    return [group.store for group in layer.groups] if isinstance(layer, GroupedLayer) else [layer]
