"""What one method holds and reads on one model: formulas only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from llm_accel.eval.tasks.bench.memory import largest_batch
from llm_accel.eval.tasks.plan.model import Geometry
from llm_accel.methods import HiP, ScoreAndKeep, StepEviction
from llm_accel.methods.sparse.hip import make_search, reach
from llm_accel.patches.plan import Plan

_LONGEST = 2**24  # tokens up to which a break-even is looked for


@dataclass(frozen=True)
class Load:
    """A prompt and its answer, ``new_tokens`` of which the last is never stored."""

    context: int
    new_tokens: int

    @property
    def stored(self) -> int:
        """Tokens that a dense cache holds at the end."""
        return self.context + self.new_tokens - 1


@dataclass(frozen=True)
class Estimate:
    """Figures of one method; bytes of a whole batch, at the end of an answer.

    Attributes:
        kv_bytes: held by keys and values; at most, where heads fill pages of their own.
        read_bytes: keys and values that the last decode step reads.
        prefill_peak: weights, caches and activations while all prompts are read in one call.
        largest_batch: rows that fit the memory; None without a limit.
        step_ms: of the last decode step, all bytes read at the memory's bandwidth.
        break_even: shortest prompt on which fewer bytes are read than by dense, choosing included; None: no such one.
    """

    kv_bytes: int
    read_bytes: int
    prefill_peak: int
    largest_batch: dict[str, Any] | None
    step_ms: float
    break_even: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def estimate(shape: Geometry, plan: Plan, load: Load, batch: int, memory: int | None, bandwidth: float) -> Estimate:
    """All figures of one method; ``bandwidth`` in bytes per second."""
    held = batch * (sum(_layers(shape, plan, load, held_entries)) + shape.state_bytes)
    read = batch * (sum(_layers(shape, plan, load, read_entries)) + shape.state_bytes)
    peak = shape.weight_bytes + batch * prompt_bytes(shape, plan, load.context)
    rows = None if memory is None else largest_batch(memory, shape.weight_bytes, peak, held, batch)
    step = 1e3 * (shape.step_bytes(batch) + read) / bandwidth
    return Estimate(held, read, peak, rows, step, break_even(shape, plan, load.new_tokens))


Rule = Callable[[Geometry, Plan, int, Load], float]


def _layers(shape: Geometry, plan: Plan, load: Load, rule: Rule) -> list[int]:
    """Bytes of one row in each layer; ``rule`` gives entries per KV head."""
    return [round(rule(shape, plan, layer, load) * nbytes) for layer, nbytes in shape.entry_bytes.items()]


def held_entries(shape: Geometry, plan: Plan, layer: int, load: Load) -> float:
    """Entries per KV head that a layer stores at the end of an answer; on average where heads differ."""
    if layer in shape.windows:
        return min(load.stored, shape.windows[layer] - 1)  # the current token brings the last one
    if layer in plan.skipped:
        return load.stored
    if plan.split is not None:
        return _split_entries(plan, layer, load)
    if plan.kv_method is None:
        return load.stored
    if isinstance(plan.kv_method, StepEviction):
        capacity = None if plan.kv_method.hides else plan.kv_method.capacity(load.context)
        return load.stored if capacity is None else min(load.stored, capacity)
    heads = shape.wiring.entries[layer].heads
    kept, grown = prompt_entries(plan, layer, load.context), load.new_tokens - 1
    page = plan.kv_method.page_size
    if page is not None and heads > 1 and kept < load.context:  # each head begins a page of its own
        return (heads * (kept + page - 1) // page + heads * -(-grown // page)) * page / heads
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


def read_entries(shape: Geometry, plan: Plan, layer: int, load: Load) -> float:
    """Entries per KV head that the last decode step reads: what is stored, or what sparse attention chooses of it."""
    held = held_entries(shape, plan, layer, load)
    method = plan.attention_method
    if layer in plan.skipped or not isinstance(method, HiP):
        return held
    return min(held, reach(make_search(method, method.budget_of(layer, plan.layers), True)))


def prompt_bytes(shape: Geometry, plan: Plan, context: int) -> int:
    """One row while its prompt is read: activations, states, and keys and values, which are cut layer by layer. Layers
    with a sliding window hold the whole prompt until the first decode step."""
    whole = {layer: context * nbytes for layer, nbytes in shape.entry_bytes.items()}
    kept = dict(whole)
    if isinstance(plan.kv_method, ScoreAndKeep) and not plan.kv_method.deferred and not reads_again(plan.kv_method):
        for layer in whole.keys() - shape.windows.keys() - plan.skipped.keys():
            kept[layer] = round(held_entries(shape, plan, layer, Load(context, 1)) * shape.entry_bytes[layer])
    largest = max((n - kept[i] for i, n in whole.items()), default=0)
    return sum(kept.values()) + largest + shape.state_bytes + context * shape.token_bytes


def reads_again(kv_method: ScoreAndKeep) -> bool:
    """Whether a method scores a context in passes of its own over the whole cache."""
    return hasattr(kv_method, "pass_score")


def break_even(shape: Geometry, plan: Plan, new_tokens: int) -> int | None:
    """The shortest prompt on which a method reads fewer bytes of keys and values than dense over a whole answer. What
    it spends: to choose, all entries of its layers once (methods that read a context again: their weights once and
    these entries twice), and kept entries copied. HiP states its own."""
    if isinstance(plan.attention_method, HiP):
        return plan.attention_method.break_even("cuda")

    def gains(context: int) -> bool:
        load, acting = Load(context, new_tokens), [i for i in shape.wiring.entries if i not in plan.skipped]
        saved = spent = 0.0
        for layer in acting:
            nbytes = shape.entry_bytes[layer]
            read = read_entries(shape, plan, layer, load)
            saved += (new_tokens - 1) * max(0.0, load.stored - read) * nbytes
            spent += (context + 2 * min(read, context)) * nbytes
        if plan.kv_method is not None and reads_again(plan.kv_method):
            spent += shape.step_bytes(context) + context * sum(shape.entry_bytes[i] for i in acting)
        return saved > spent

    longest = 1
    while longest < _LONGEST and not gains(longest):
        longest *= 2
    if not gains(longest):
        return None
    low, high = longest // 2, longest
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if gains(middle) else (middle, high)
    return high
