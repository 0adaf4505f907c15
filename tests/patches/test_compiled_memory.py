"""What the first compiled step of a cache takes: its entries move into buffers, and are never held twice."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

import llm_accel
from llm_accel.patches.cache_name import CACHE
from llm_accel.patches.compiled import call, pool
from llm_accel.registry import parse
from tests.tiny import prompt, tiny_model

LAYERS, PROMPT, STEP = 32, 2176, "first compiled step"
METHODS = (
    "dense",
    "snapkv:budget=2048",
    "h2o:budget=2048",
    "adakv:budget=2048",
    "hip:sink=64,window=256,budget=256",
    "streaming_llm:budget=2048",
    "pyramidkv:budget=1024",
)


def storage(cache: Any) -> int:
    """Bytes of everything that the layers hold."""
    found = {}
    for layer in cache.layers:
        tensors = [value for value in vars(layer).values() if isinstance(value, torch.Tensor)]
        found |= {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(found.values())


def peak(recorded: Any) -> int:
    """Most bytes that were allocated during the step beside what there was before it."""
    events = recorded.profiler.kineto_results.events()
    step = next(event for event in events if event.name() == STEP)
    allocated = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    most = now = 0
    for time, size in allocated:
        if step.start_ns() <= time <= step.end_ns():
            now += size
            most = max(most, now)
    return most


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps run as they are: what a compiler allocates is not what is asked here."""
    monkeypatch.setattr(call.DecodeCall, "_compiled", lambda *_: call._step)


@pytest.mark.parametrize("method", METHODS)
def test_the_first_step_never_holds_the_cache_twice(method: str, untraced: None) -> None:
    model: Any = tiny_model("llama", num_hidden_layers=LAYERS)
    handle = llm_accel.apply(model, "dense" if method == "dense" else parse(method), decode="compiled")
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        cache: Any = handle.new_cache()
        model(prompt(PROMPT), **{CACHE: cache})
        cache.llm_accel.headroom = 64
        held = storage(cache)
        with record_function(STEP):
            model(torch.tensor([[5]]), **{CACHE: cache})
    assert handle.report().backends["decode steps"][0] == "compiled"
    assert 1 <= (held + peak(recorded)) / held <= 1.15


def test_large_buffers_do_not_wait_for_the_next_prompt(untraced: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their memory is what the entries of the next prompt need."""
    model: Any = tiny_model("llama")
    handle = llm_accel.apply(model, "dense", decode="compiled")
    for limit in (pool.IDLE, 1000):
        monkeypatch.setattr(pool, "IDLE", limit)
        model.generate(prompt(40), max_new_tokens=4)
        assert handle.report().backends["decode steps"][0] == "compiled"
        idle = sum(buffers.nbytes for buffers in model.model._compiled_call_impl._pool._idle)
        assert idle <= limit and (idle > 0) == (limit > 1000)
