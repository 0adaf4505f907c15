"""How large the buffers of compiled decoding are, so that as many prompts as possible share a graph."""

from __future__ import annotations

from typing import Any

from llm_accel.cache import AccelLayer, GroupedLayer, RaggedLayer, SlotLayer, SparseLayer
from llm_accel.cache.fixed import FixedSpec, Shape, bucket, round_up
from llm_accel.kernels import ragged_decode
from llm_accel.kernels.block_list import BLOCK_K
from llm_accel.kernels.dispatch import Problem
from llm_accel.methods import ScoreAndKeep, StepEviction
from llm_accel.patches.base_attention import stores_latents
from llm_accel.patches.plan import Plan
from llm_accel.patches.steps import OverwritingStep

_ENDLESS = 2**40  # tokens of a prompt that exceeds every budget
_SMALL = 4096  # budgets up to this one get their buffers whole, even after shorter prompts


class Sizes:
    """Works out a specification for each layer.

    Attributes:
        headroom: tokens that can be decoded before the buffers are full; less than was asked for where a layer says so.

    Args:
        plan: the applied methods.
        decoder: the model's decoder.
        headroom: tokens that are to be decoded.
    """

    def __init__(self, plan: Plan, decoder: Any, headroom: int) -> None:
        self.headroom = headroom
        self._plan, self._config, self._latents = plan, decoder.config, stores_latents(decoder)

    def of(self, index: int, layer: AccelLayer) -> tuple[FixedSpec, ...]:
        """The specification of layer ``index``, or one for each group of its heads."""
        plan = self._plan
        if isinstance(layer, GroupedLayer):
            assert plan.split is not None
            methods = {id(layer.full): plan.split.full_compression, id(layer.stream): plan.split.streaming}
            return tuple(self._spec(index, group.store, layer.kv_heads, methods[id(group)]) for group in layer.groups)
        return (self._spec(index, layer, layer.kv_heads, plan.kv_method if index not in plan.skipped else None),)

    def _spec(self, index: int, layer: AccelLayer, kv_heads: int, method: ScoreAndKeep | None) -> FixedSpec:
        if isinstance(layer, SlotLayer):
            assert isinstance(method, StepEviction)
            return self._slots(index, layer, method)
        count, limit, capacity = layer.physical_length(), None, self._plan.capacity
        if method is not None and method.ratio is None:
            limit = method.layer_entries(_ENDLESS, self._plan.depth(index, later=False))
        if isinstance(layer, RaggedLayer) and layer.table is not None:
            entries = self._entries(layer.mean_length(), limit)
            return FixedSpec(_shape(layer, entries), headroom=self.headroom)
        if count + self.headroom > capacity:
            capacity = self._entries(count, limit)
        query_heads = int(self._config.num_attention_heads)
        group = None if self._latents else query_heads // kv_heads
        if isinstance(layer, SparseLayer):
            shape = _shape(layer, round_up(capacity, max(BLOCK_K)))  # whole blocks of any size
            return FixedSpec(shape, _has_kernel(shape, group), heads=query_heads if group is None else shape.heads)
        shape = _shape(layer, round_up(capacity))
        return FixedSpec(shape, _has_kernel(shape, group))

    def _entries(self, count: int, limit: int | None) -> int:
        """Entries that there must be place for, those to come among them, now that there are ``count``: as many after
        every prompt, if possible, and not many times more than needed."""
        if limit is not None and count <= limit and (limit <= _SMALL or count == limit):
            return limit + self.headroom
        return bucket(count + self.headroom)

    def _slots(self, index: int, layer: SlotLayer, method: StepEviction) -> FixedSpec:
        count, most = layer.physical_length(), layer.capacity
        assert most is not None
        capacity = most if most <= _SMALL else min(most, bucket(count + self.headroom))
        if capacity < most:
            self.headroom = min(self.headroom, capacity - count)
        return FixedSpec(_shape(layer, capacity), step=OverwritingStep(method, index, self._plan.layers))


def _shape(layer: AccelLayer, capacity: int) -> Shape:
    keys, values = layer.keys, layer.values
    widths = (keys.shape[-1], values.shape[-1])
    return Shape(layer.rows, layer.kv_heads, capacity, *widths, keys.dtype, keys.device)


def _has_kernel(shape: Shape, group: int | None) -> bool:
    """Whether the kernel that takes lengths can read such buffers; ``group``: query heads per KV head, None where the
    model expands what is stored before attention sees it."""
    if group is None:
        return False
    problem = Problem(shape.device, shape.dtype, max(shape.key_width, shape.value_width), group)
    return ragged_decode.OP.choose(problem).name == "triton"
