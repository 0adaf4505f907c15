"""The invariants that hold for every method on every family."""

from __future__ import annotations

import torch

import llm_accel
from llm_accel.cache import RaggedLayer
from llm_accel.methods import Depth
from tests.contracts.laws import (
    EXACT,
    check_going_past_raises,
    check_no_memory,
    check_nothing_to_cut,
    check_undo,
)
from tests.contracts.matrix import (
    BUDGET,
    LONG,
    METHODS,
    NEW,
    STEPWISE,
    acting,
    always_kept,
    check_kept,
    check_stored,
    every_family,
    every_method,
    every_prompt_method,
    every_shape,
    generate,
    make_batch,
    pages_held,
    stored_after,
)
from tests.contracts.oracle import masked, visible_columns
from tests.tiny import tiny_model

WINDOWS = {"snapkv": 8, "pyramidkv": 8, "adakv": 8, "random": 8, "h2o": BUDGET // 2}
SINKS = {"h2o": 4, "streaming_llm": 4}


@every_shape
@every_method
@every_family
def test_nothing_to_cut_changes_nothing(family: str, method: str, shape: str) -> None:
    model, batch = tiny_model(family), make_batch(shape, long=True)
    for config in (METHODS[method](budget=batch.ids.shape[1] + NEW), METHODS[method](budget=None, ratio=1.0)):
        check_nothing_to_cut(model, batch, config)


@every_shape
@every_method
@every_family
def test_short_prompts_pass_through(family: str, method: str, shape: str) -> None:
    check_nothing_to_cut(tiny_model(family), make_batch(shape, long=False), METHODS[method]())


@every_shape
@every_method
@every_family
def test_undo_is_exact(family: str, method: str, shape: str) -> None:
    check_undo(family, make_batch(shape, long=True), METHODS[method]())


@every_shape
@every_method
@every_family
def test_eviction_is_real(family: str, method: str, shape: str) -> None:
    model, batch = tiny_model(family), make_batch(shape, long=True)
    with llm_accel.apply(model, METHODS[method]()) as handle:
        cache = handle.new_cache()
        generate(model, batch, past_key_values=cache)
        report = handle.report()
    assert acting(report)
    for layer, depth in acting(report):
        stored = cache.layers[layer.layer]
        expected = stored_after(method, NEW - 1, depth, batch.lengths)
        assert layer.logical_length == batch.ids.shape[1] + NEW - 1
        assert stored.get_seq_length() == layer.logical_length
        check_stored(method, layer, expected)
        heads = len(batch.ids) * stored.kv_heads
        entry = (stored.keys.shape[-1] + stored.values.shape[-1]) * stored.keys.element_size()
        slots = heads * expected
        if isinstance(stored, RaggedLayer) and stored.kv_heads > 1:
            after_prompt = stored.lengths() - (NEW - 1)
            for row, length in zip(after_prompt, batch.lengths, strict=True):
                assert row.sum() == stored.kv_heads * METHODS[method]().layer_entries(length, depth)
            assert layer.physical_length == stored.lengths().max()
            slots = pages_held(after_prompt, stored.page, NEW - 1) * stored.page
        held = stored.keys.untyped_storage().nbytes() + stored.values.untyped_storage().nbytes()
        assert held == slots * entry == layer.kv_bytes
        assert layer.dense_kv_bytes == heads * entry * layer.logical_length


@every_shape
@every_prompt_method
@every_family
def test_evicted_is_masked(family: str, method: str, shape: str) -> None:
    steps = 17
    model, batch = tiny_model(family), make_batch(shape, long=True)
    with llm_accel.apply(model, METHODS[method](), trace=True) as handle:
        tokens, logits = generate(model, batch, max_new_tokens=steps)
        report = handle.report()
    visible = {
        layer.layer: visible_columns(layer.kept, batch.ids.shape[1], batch.lengths)
        for layer in report.layers
        if layer.kept is not None
    }
    assert visible
    with masked(model, visible):
        oracle_tokens, oracle_logits = generate(model, batch, max_new_tokens=steps)
    assert torch.equal(tokens, oracle_tokens)
    assert (logits - oracle_logits).abs().max() <= EXACT


@every_method
@every_family
def test_rows_are_independent(family: str, method: str) -> None:
    model, batch = tiny_model(family), make_batch("padded", long=True)
    with llm_accel.apply(model, METHODS[method](), trace=True) as handle:
        tokens, logits = generate(model, batch)
        together = handle.report()
        for index, length in enumerate(batch.lengths):
            row = make_batch("single", long=True)
            row = type(row)(batch.row(index), None, (length,))
            alone_tokens, alone_logits = generate(model, row)
            assert torch.equal(tokens[index], alone_tokens[0])
            assert (logits[index] - alone_logits[0]).abs().max() <= EXACT
            for layer, depth in acting(together):
                alone = handle.report().layers[layer.layer]
                if layer.kept is None:
                    continue
                present = METHODS[method]().layer_entries(length + (NEW - 1 if method in STEPWISE else 0), depth)
                heads = check_kept(method, layer.kept[index], present)
                if alone.kept is not None:
                    assert heads == check_kept(method, alone.kept[0], present)


@every_shape
@every_method
@every_family
def test_no_memory_between_calls(family: str, method: str, shape: str) -> None:
    check_no_memory(tiny_model(family), shape, METHODS[method]())


@every_method
def test_always_kept_entries_stay(method: str) -> None:
    model, batch = tiny_model("llama"), make_batch("padded", long=True)
    config = METHODS[method]()
    with llm_accel.apply(model, config, trace=True) as handle:
        generate(model, batch)
        for layer, depth in acting(handle.report()):
            for row, length in enumerate(batch.lengths):
                seen = length + (NEW - 1 if method in STEPWISE else 0)
                for kept in check_kept(method, layer.kept[row], config.layer_entries(seen, depth)):
                    assert kept >= always_kept(config, seen, depth)


def test_what_methods_say_they_always_keep() -> None:
    """Sinks, windows and recent entries, so that the test above asks for them."""
    stated = {name: always_kept(make(), LONG, Depth()) for name, make in METHODS.items() if name in WINDOWS | SINKS}
    for name, window in WINDOWS.items():
        assert stated[name] >= set(range(LONG - window, LONG))
    for name, sinks in SINKS.items():
        assert stated[name] >= set(range(sinks))


@every_method
def test_a_call_that_should_have_evicted_and_did_not_raises(method: str) -> None:
    check_going_past_raises(METHODS[method]())
