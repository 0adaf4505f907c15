"""What the rows of a cache come to hold under a plan: formulas only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llm_accel.cache.stock import windows_of
from llm_accel.methods import StepEviction
from llm_accel.patches.acceptance import stock_layers
from llm_accel.patches.plan import Plan
from llm_accel.patches.wiring import Wiring, wiring_of


@dataclass(frozen=True)
class Storage:
    """What the cache layers of a model store.

    Attributes:
        wiring: keys, values and states of each layer.
        windows: layer -> tokens of its sliding window.
    """

    wiring: Wiring
    windows: Mapping[int, int]

    @staticmethod
    def of(decoder: Any) -> Storage:
        """Of this decoder."""
        return Storage(wiring_of(decoder), windows_of(stock_layers(decoder.config)))

    @property
    def entry_bytes(self) -> dict[int, int]:
        """Layer -> bytes of one token in its cache."""
        return {layer: entry.nbytes for layer, entry in self.wiring.entries.items()}

    @property
    def state_bytes(self) -> int:
        """Linear-attention states of one row."""
        return sum(self.wiring.states.values())


@dataclass(frozen=True)
class Load:
    """A prompt and its answer, ``new_tokens`` of which the last is never stored."""

    context: int
    new_tokens: int

    @property
    def stored(self) -> int:
        """Tokens that a dense cache holds at the end."""
        return self.context + self.new_tokens - 1


Rule = Callable[[Any, Plan, int, Load], float]


def row_bytes(storage: Storage, plan: Plan, load: Load) -> int:
    """Bytes that one row holds at the end of its answer."""
    return sum(layer_bytes(storage, plan, load, held_entries)) + storage.state_bytes


def layer_bytes(storage: Any, plan: Plan, load: Load, rule: Rule) -> list[int]:
    """Bytes of one row in each layer; ``rule`` gives entries per KV head."""
    return [round(rule(storage, plan, layer, load) * nbytes) for layer, nbytes in storage.entry_bytes.items()]


def held_entries(storage: Storage, plan: Plan, layer: int, load: Load) -> float:
    """Entries per KV head that a layer stores at the end of an answer; on average where heads differ."""
    if layer in storage.windows:
        return min(load.stored, storage.windows[layer] - 1)  # the current token brings the last one
    if layer in plan.skipped:
        return load.stored
    if plan.split is not None:
        return _split_entries(plan, layer, load)
    if plan.kv_method is None:
        return load.stored
    if isinstance(plan.kv_method, StepEviction):
        capacity = None if plan.kv_method.hides else plan.kv_method.capacity(load.context)
        return load.stored if capacity is None else min(load.stored, capacity)
    heads = storage.wiring.entries[layer].heads
    kept, grown = prompt_entries(plan, layer, load.context), load.new_tokens - 1
    page = plan.kv_method.page_size
    if page is not None and heads > 1 and kept < load.context:  # each head begins a page of its own
        return (-(-heads * (kept + page - 1) // page) + heads * -(-grown // page)) * page / heads
    every = plan.kv_method.cuts_every
    return kept + grown if every is None else min(kept + grown, plan.kv_method.entries(load.stored) + every)


def prompt_entries(plan: Plan, layer: int, context: int) -> int:
    """Entries per KV head that stay of a prompt in a layer that a method acts on; on average where heads differ."""
    return context if plan.kv_method is None else plan.kv_method.layer_entries(context, plan.depth(layer, later=False))


def _split_entries(plan: Plan, layer: int, load: Load) -> float:
    assert plan.split is not None
    full = len(plan.split.full[layer])
    packed = plan.split.full_compression
    whole = load.stored if packed is None else packed.entries(load.context) + load.new_tokens - 1
    stream = min(load.stored, plan.split.sinks + plan.split.recent)
    return (full * whole + (plan.kv_heads - full) * stream) / plan.kv_heads
