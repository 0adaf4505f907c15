"""Caches whose rows come and go: those of several prompts in one, and what is left when rows leave it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from llm_accel.cache import AccelLayer, GroupedLayer, SlotLayer
from llm_accel.cache.joining import joined
from llm_accel.cache.linear import join_states
from llm_accel.cache.stock import has_linear_state
from llm_accel.methods import StepEviction
from llm_accel.patches.eviction import step_view
from llm_accel.patches.hook import attach_session, session_of
from llm_accel.patches.plan import Plan


def stock_rows(cache: Any) -> bool:
    """Whether rows of such a cache, of a model without a plug-in, can be joined: they are aligned as padding is."""
    return bool(cache.layers) and all(type(layer) in _STOCK for layer in cache.layers)


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


_STOCK = (DynamicLayer, DynamicSlidingWindowLayer)


def lengths_mix(plan: Plan | None) -> bool:
    """Whether prompts of different lengths that are read in one call give what each gives alone: not where slots are
    overwritten of which there are more after a longer prompt, since a layer has one number of them for all rows."""
    method = None if plan is None else plan.kv_method
    return not isinstance(method, StepEviction) or method.ratio is None


def join_running(config: Any, caches: Sequence[Any], length: int, spend: bool = True) -> DynamicCache:
    """The rows of caches of one :func:`kind_of`, all of them between decode steps, in one cache that has seen
    ``length`` tokens, as many as the longest of them or more. ``spend``: what is joined is taken out of ``caches``,
    layer by layer."""
    sessions = [session for session in map(session_of, caches) if session is not None]
    for session in sessions:
        session.end_graph()
    plan = sessions[0].plan if sessions else None
    whole = DynamicCache(config=config)
    if plan is not None:
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
    if session is not None:
        session.end_graph()
    index = torch.tensor(rows)
    for layer in cache.layers:
        if isinstance(layer, AccelLayer):
            layer.select_rows(index, padding)
            continue
        layer.batch_select_indices(index)
        if type(layer) in _STOCK:
            _trim_stock(layer, padding)


def _trim_stock(layer: Any, padding: int) -> None:
    seen = layer.get_seq_length() - padding
    if type(layer) is DynamicSlidingWindowLayer:
        layer.cumulative_length, seen = seen, min(seen, layer.sliding_window - 1)
    begin = layer.keys.shape[2] - seen
    layer.keys, layer.values = layer.keys[:, :, begin:].contiguous(), layer.values[:, :, begin:].contiguous()


def join_layer(
    plan: Plan | None,
    layer: Any,
    parts: Sequence[Any],
    length: int,
    capacity: Callable[[StepEviction, SlotLayer], int | None],
) -> None:
    """Fills an empty layer with the rows of ``parts``, padded to ``length`` tokens. ``capacity``: how many slots there
    are where a method overwrites them, as the first of the parts has them."""
    if type(layer) in _STOCK:
        layer.lazy_initialization(parts[0].keys, parts[0].values)
        layer.keys = joined([part.keys for part in parts], -2, 0)
        layer.values = joined([part.values for part in parts], -2, 0)
        layer.cumulative_length = length  # of a layer that keeps all, nobody reads it
    elif isinstance(layer, AccelLayer):
        layer.join(parts, length)
        assert plan is not None
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
