"""What one round of the engine does: whose turn it is, who leaves, what fails, and what the memory holds."""

from __future__ import annotations

import asyncio
import copy
import functools
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import torch

from llm_accel.cache import headroom
from llm_accel.methods import RetrievalHeads, SnapKV, StreamingLLM
from llm_accel.patches.compiled import call
from llm_accel.patches.hook import session_of
from llm_accel.serve import engine, logprobs
from llm_accel.serve.errors import ApiError
from llm_accel.serve.sequences import Job
from tests.contracts.matrix import BUDGET
from tests.serve.test_engine import CHUNK, Driven, Methods, check, ids
from tests.tiny import tiny_model

SNAP = (SnapKV(budget=BUDGET, window=8),)


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test that runs in an event loop, which jobs need."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        asyncio.run(test(**fixtures))

    return run


def tokens(job: Job) -> int:
    return len(job.sequences[0].tokens)


@in_loop
async def test_a_long_prompt_stops_nobody_for_longer_than_a_chunk() -> None:
    driven = Driven(tiny_model("llama"))
    calls: list[int] = []
    driven.engine._forward.model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    short = driven.submit([ids(9, 0)], SNAP, 20)
    driven.round()
    driven.submit([ids(110, 1)], SNAP, 2)
    for expected in (3, 4, 5):  # three chunks, and a token of the short one after each
        driven.round()
        assert tokens(short) == expected
    assert calls == [9, 1, CHUNK, 1, CHUNK, 1, 110 - 2 * CHUNK, 1]


@pytest.mark.parametrize("rounds", [*range(6), 9])
@in_loop
async def test_a_cancelled_request_frees_its_slot_within_a_step_whenever_it_comes(rounds: int) -> None:
    """While it waits, while its prompt is read, and at any token."""
    driven = Driven(tiny_model("llama"), max_batch=1)
    first, second = (driven.submit([ids(110, seed)], SNAP, 8) for seed in range(2))
    for _ in range(rounds):
        driven.round()
    driven.engine.cancel(first)
    driven.round()
    assert first.sequences[0] not in driven.engine.running
    driven.round()
    assert second.sequences[0] in driven.engine.running


@in_loop
async def test_log_probabilities_of_a_prompt_end_with_who_wanted_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "_AT_ONCE", 16)
    driven, calls = Driven(tiny_model("llama"), max_batch=1), []
    driven.engine._forward.model.register_forward_pre_hook(lambda *_: calls.append(1))
    first = driven.submit([ids(110, 0)], SNAP, 8, prompt_logprobs=1)
    for _ in range(3):
        driven.round()
    driven.engine.cancel(first)
    calls.clear()
    second = driven.submit([ids(20, 1)], SNAP, 1)
    driven.finish()
    assert len(calls) == 1 and tokens(second) == 1 and 1 < len(first.sequences[0].prompt_logprobs) < 110


@in_loop
async def test_who_is_cancelled_leaves_in_the_next_round() -> None:
    driven = Driven(tiny_model("llama"), max_batch=2)
    first, second = (driven.submit([ids(20, seed)], SNAP, 30) for seed in range(2))
    waiting = driven.submit([ids(20, 2)], SNAP, 2)
    driven.round()
    driven.round()
    [group] = driven.engine._groups
    assert [row.job for row in group.rows] == [first, second] and len(driven.engine.scheduler) == 1
    before, held = tokens(first), group.nbytes
    driven.engine.cancel(first)
    driven.round()
    assert tokens(first) == before and [row.job for row in group.rows] == [second]
    assert group.nbytes < held
    driven.round()
    assert tokens(waiting) > 0
    reading = driven.submit([ids(110, 3)], SNAP, 2)
    driven.round()
    driven.engine.cancel(reading)
    driven.round()
    assert reading.sequences[0] not in driven.engine.running


@in_loop
async def test_memory_is_let_go_with_the_longest_row() -> None:
    model = tiny_model("llama")
    driven = Driven(copy.deepcopy(model))
    long, short = driven.submit([ids(120, 0)], (), 2), driven.submit([ids(10, 1)], (), 30)
    while long.sequences[0].finish is None or tokens(short) < 3:
        driven.round()
    [group] = driven.engine._groups
    layer: Any = group.running.cache.layers[0]
    assert layer.physical_length() < 20 and layer.get_seq_length() < 20 and layer.start is None
    assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes
    driven.finish()
    check(model, short)


@in_loop
async def test_what_fails_ends_its_own_rows_only() -> None:
    driven = Driven(tiny_model("llama"))
    jobs = [driven.submit([ids(20, seed)], method, 30) for seed, method in enumerate([SNAP, SNAP, ()])]
    for _ in range(4):
        driven.round()
    [snap, _] = driven.engine._groups
    snap.running.cache.layers[0].keys = None
    driven.finish()
    await asyncio.sleep(0)
    for job in jobs[:2]:
        with pytest.raises(ApiError, match="the server's log says why"):
            _ = [delta async for delta in job.deltas()]
    assert tokens(jobs[2]) == 30 and driven.engine.metrics.failed_steps._value.get() == 1


@in_loop
async def test_methods_are_put_off_and_on_without_another_trial() -> None:
    model = tiny_model("llama")
    driven = Driven(copy.deepcopy(model), decode="eager")
    jobs = [driven.submit([ids(40, seed)], method, 6) for seed, method in enumerate([SNAP, (), SNAP, ()])]
    handles = {id(one) for one in driven.engine._methods._hooks.values()}
    driven.finish()
    assert {id(one) for one in driven.engine._methods._hooks.values()} >= handles
    assert len(driven.engine._methods._hooks) == 2
    for job in jobs:
        check(model, job)
    driven.engine._methods.rest()
    assert not driven.engine._forward.model.get_decoder()._forward_pre_hooks


def test_compiled_steps_see_powers_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, "backend", lambda: "eager")  # captured, and run as it is

    async def scenario() -> None:
        model = tiny_model("llama")
        driven = Driven(copy.deepcopy(model), decode="compiled")
        jobs = [driven.submit([ids(20, seed)], SNAP, new) for seed, new in enumerate([12, 4, 9])]
        widths, graphs = [], 0
        while driven.engine.running or len(driven.engine.scheduler):
            driven.round()
            widths += [group.running.width for group in driven.engine._groups]
            sessions = [session_of(group.running.cache) for group in driven.engine._groups]
            graphs += sum(session is not None and session.graph is not None for session in sessions)
        assert set(widths) == {1, 2, 4} and graphs > 3
        for job in jobs:
            check(model, job)

    asyncio.run(scenario())


@in_loop
async def test_rows_wait_for_memory() -> None:
    model = tiny_model("llama")
    entry = 3 * 2 * 2 * 16 * 4  # layers, keys and values, KV heads, channels, fp32
    driven = Driven(copy.deepcopy(model), kv_memory_mib=2.5 * 110 * entry / 2**20)
    dense = [driven.submit([ids(100, seed)], (), 11) for seed in range(4)]
    most = 0
    while driven.engine.running or len(driven.engine.scheduler):
        driven.round()
        most = max(most, sum(len(group.rows) for group in driven.engine._groups))
    assert most == 2
    small = [driven.submit([ids(100, seed)], (StreamingLLM(budget=BUDGET),), 20) for seed in range(5)]
    for _ in range(60):
        driven.round()
        most = max(most, sum(len(group.rows) for group in driven.engine._groups))
    assert most == 5
    driven.finish()
    for job in (*dense, *small):
        check(model, job)
    huge = driven.submit([ids(110, 9)], (), 400)
    driven.finish()
    await asyncio.sleep(0)
    with pytest.raises(ApiError, match=r"need up to .* MiB of keys and values with dense; this server has"):
        _ = [delta async for delta in huge.deltas()]


def test_slots_are_told_before_anything_is_served() -> None:
    limits = {"kv_memory_mib": 1, "max_model_len": 1000, "max_new_tokens": 100, "max_batch": 64}
    driven = Driven(tiny_model("llama"), method="snapkv:budget=40", **limits)
    entry, dense = 3 * 2 * 2 * 16 * 4, 999  # the last token is never stored
    rows = {"snapkv:budget=40": 2**20 // ((40 + 99) * entry), "dense": 2**20 // (dense * entry)}
    assert driven.engine.slots() == rows and rows["dense"] == 1 < rows["snapkv:budget=40"] < 64


@torch.no_grad()
def greedy(model: Any, prompt: tuple[int, ...], new: int) -> list[int]:
    given = list(prompt)
    for _ in range(new):
        given.append(int(model(torch.tensor([given])).logits[0, -1].argmax()))
    return given[len(prompt) :]


@in_loop
async def test_the_models_own_rules_hold_for_each_row() -> None:
    model = tiny_model("llama")
    [free] = [greedy(model, ids(20, 0), 1)]
    model.generation_config.suppress_tokens = free
    driven = Driven(copy.deepcopy(model))
    jobs = [driven.submit([ids(20, seed)], (), 5) for seed in range(3)]
    driven.finish()
    assert jobs[0].sequences[0].tokens[0] != free[0]
    for job in jobs:
        check(model, job)


@pytest.mark.parametrize(
    "method", [SNAP, (RetrievalHeads(head_list=("0.0", "1.1"), sinks=2, recent=10, prefill="chunk"),)]
)
def test_prompts_are_read_in_long_chunks_while_nobody_decodes(method: Methods, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that cuts after each chunk gets the same ones whatever runs beside it."""
    monkeypatch.setattr(engine, "STEP_TOKENS", {"cpu": 30, "cuda": 30})
    monkeypatch.setattr(engine, "IDLE_TOKENS", {"cpu": 80, "cuda": 80})

    async def scenario() -> None:
        driven = Driven(tiny_model("llama"), max_step_tokens=None)
        calls: list[int] = []
        driven.engine._forward.model.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        alone = driven.submit([ids(100, 0)], method, 30)
        driven.finish()
        assert [call for call in calls if call > 1] == ([80, 20] if method is SNAP else [30, 30, 30, 10])
        calls.clear()
        beside = [driven.submit([ids(length, 0)], method, 30) for length in (9, 100)]
        driven.finish()
        assert [call for call in calls if call > 1] == [9, 30, 30, 30, 10]
        assert beside[1].sequences[0].tokens == alone.sequences[0].tokens

    asyncio.run(scenario())


@in_loop
async def test_a_light_model_decodes_in_one_thread() -> None:
    """Several would wait for each other, and for the cores that event loop and clients hold."""
    threads, driven = torch.get_num_threads(), Driven(tiny_model("llama"))
    seen: list[tuple[int, int]] = []
    driven.engine._forward.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((kwargs["input_ids"].shape[1], torch.get_num_threads())), with_kwargs=True
    )
    torch.set_num_threads(2)
    try:
        driven.submit([ids(9, 0)], SNAP, 4)
        driven.finish()
        assert seen == [(9, 2), (1, 1), (1, 1), (1, 1)] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@in_loop
async def test_rows_that_come_and_go_copy_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group has headroom for the answers in it and no more, so that its steps only write."""
    monkeypatch.setattr(headroom, "LARGE", 1)
    model = tiny_model("llama")
    driven = Driven(copy.deepcopy(model))
    jobs = [driven.submit([ids(20 + seed, seed)], SNAP, 12 - 3 * seed) for seed in range(3)]
    while len(driven.engine.scheduler) or driven.engine._reading:
        driven.round()
    [group] = driven.engine._groups
    places, layer = [], group.running.cache.layers[0]
    while driven.engine.running:
        slots = layer.keys.untyped_storage().nbytes() // (layer.keys.nbytes // layer.keys.shape[2])
        remaining = max(row.job.max_new_tokens - len(row.tokens) for row in group.rows)
        assert slots <= layer.keys.shape[2] + remaining
        places.append(layer.keys.data_ptr())
        driven.round()
    assert len(set(places)) <= 3  # one for each time that a row left, and the first
    for job in jobs:
        check(model, job)
