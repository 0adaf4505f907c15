"""What one method holds and reads on one model: formulas only."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from llm_accel.eval.tasks.bench.memory import largest_batch
from llm_accel.eval.tasks.plan.model import Geometry
from llm_accel.methods import HiP, ScoreAndKeep
from llm_accel.methods.context import ContextCompression
from llm_accel.methods.sparse.hip import make_search, reach
from llm_accel.patches.footprint import Load, held_entries, layer_bytes, row_bytes
from llm_accel.patches.plan import Plan

_LONGEST = 2**24  # tokens up to which a break-even is looked for


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
    held = batch * row_bytes(shape, plan, load)
    read = batch * (sum(layer_bytes(shape, plan, load, read_entries)) + shape.state_bytes)
    peak = shape.weight_bytes + batch * prompt_bytes(shape, plan, load.context)
    rows = None if memory is None else largest_batch(memory, shape.weight_bytes, peak, held, batch)
    step = 1e3 * (shape.step_bytes(batch) + read) / bandwidth
    return Estimate(held, read, peak, rows, step, break_even(shape, plan, load.new_tokens))


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
    if isinstance(plan.kv_method, ScoreAndKeep) and not plan.kv_method.deferred and not plan.kv_method.layers_compete:
        for layer in whole.keys() - shape.windows.keys() - plan.skipped.keys():
            kept[layer] = round(held_entries(shape, plan, layer, Load(context, 1)) * shape.entry_bytes[layer])
    largest = max((n - kept[i] for i, n in whole.items()), default=0)
    return sum(kept.values()) + largest + shape.state_bytes + context * shape.token_bytes


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
        if isinstance(plan.kv_method, ContextCompression):
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
