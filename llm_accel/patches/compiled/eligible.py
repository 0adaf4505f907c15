"""Which plans decode as a compiled graph, and why the others do not."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer

from llm_accel.kernels import ragged_decode
from llm_accel.kernels.dispatch import Problem
from llm_accel.methods import AttentionMethod, StepEviction
from llm_accel.patches.plan import Plan

COMPILED = "one graph for all prompts, on buffers of fixed size"


def why_eager(plan: Plan, decoder: Any, problem: Problem) -> str | None:
    """Why decode steps of this model under these methods cannot be one graph, or None."""
    kv_method = plan.kv_method
    if plan.attention_method is not None and type(plan.attention_method).fixed_step is AttentionMethod.fixed_step:
        return f"{plan.attention_method.name} reads as many entries as it selects"
    if plan.decoding is not None:
        return f"{plan.decoding.name} looks at each generated token"
    if plan.weight_shift is not None:
        return f"{plan.weight_shift.name} looks up the entries it has marked, of which each prompt has its own number"
    if plan.mask is not None:
        return "heads are silenced"
    if plan.hides:
        return "entries are hidden, not evicted"
    if kv_method is not None and kv_method.cuts_every is not None:
        return f"recompress_every={kv_method.cuts_every} evicts between steps"
    if isinstance(kv_method, StepEviction) and kv_method.ratio is not None:
        return "ratio gives each prompt a cache of its own size; give budget"
    if isinstance(kv_method, StepEviction) and kv_method.relative_positions:
        return "positions are ranks in the cache"
    keyed = [layer for layer in DynamicCache(config=decoder.config).layers if isinstance(layer, CacheLayerMixin)]
    others = {type(layer).__name__ for layer in keyed if type(layer) is not DynamicLayer}
    if others:
        return f"some layers hold a {', '.join(sorted(others))}"
    if plan.readers:
        return "some layers read the entries of others"
    if plan.base.startswith("flash") and ragged_decode.OP.choose(problem).name != "triton":
        return f"{plan.base} takes no mask, and the kernel that takes lengths does not run here"
    if isinstance(kv_method, StepEviction) and plan.base.startswith("flash"):
        return f"{plan.base} takes no mask"
    if not getattr(decoder, "_can_compile_fullgraph", False):
        return f"{type(decoder).__name__} cannot be compiled as one graph, says transformers"
    if plan.heads.query_heads:
        return "processes share the weights, and their exchange within a graph has not been tested"
    if len(set(getattr(decoder, "hf_device_map", {}).values())) > 1:
        return "the model lies on several devices"
    return None
