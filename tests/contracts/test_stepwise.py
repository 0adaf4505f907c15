"""Methods that evict while decoding equal a plain-python compaction loop, step by step."""

from __future__ import annotations

import pytest
import torch

import llm_accel
from llm_accel import H2O, StreamingLLM
from tests.contracts.laws import EXACT, searched
from tests.contracts.matrix import (
    BUDGET,
    METHODS,
    STEPWISE,
    every_family,
    every_shape,
    every_stepwise_method,
    generate,
    make_batch,
)
from tests.contracts.step_oracle import CompactionOracle, compacted
from tests.tiny import prompt, tiny_model


@every_shape
@every_stepwise_method
@every_family
def test_decoding_equals_the_compaction_oracle(family: str, method: str, shape: str) -> None:
    model, batch, config = tiny_model(family), make_batch(shape, long=True), METHODS[method]()
    with llm_accel.apply(model, config, trace=True) as handle:
        tokens, logits = generate(model, batch, max_new_tokens=20)
        report = handle.report()
    acted = tuple(layer.layer for layer in report.layers if layer.skipped_reason is None)
    heads = {layer.kept.shape[1] for layer in report.layers if layer.kept is not None}.pop()
    with compacted(model, CompactionOracle(config, batch.lengths, acted, heads)) as oracle:
        oracle_tokens, oracle_logits = generate(model, batch, max_new_tokens=20)
    assert torch.equal(tokens, oracle_tokens)
    assert (logits - oracle_logits).abs().max() <= EXACT
    for layer in report.layers:
        if layer.kept is None:
            continue
        for (row, head), entries in oracle.kept[layer.layer].items():
            padding = max(batch.lengths) - batch.lengths[row]
            ours = layer.kept[row, head]
            assert ours[ours >= 0].tolist() == sorted(column - padding for column in entries)


@pytest.mark.parametrize(
    "config",
    [
        H2O(budget=16, sinks=0),
        H2O(budget=16, sinks=0, norm="mean"),
        H2O(budget=16, sinks=2, decay=0.9),
        H2O(heavy=10, recent=3, sinks=0),
        H2O(heavy=0, recent=12, sinks=0),
        StreamingLLM(budget=16, sinks=0),
        StreamingLLM(budget=16, sinks=3),
    ],
    ids=lambda config: config.spec(),
)
def test_kept_sets_equal_the_oracle_at_each_of_64_steps(config: H2O | StreamingLLM) -> None:
    model, ids = tiny_model("llama"), prompt(40)
    with torch.no_grad(), llm_accel.apply(model, config, trace=True) as handle:
        cache = handle.new_cache()
        step, tokens, kept, pointers = ids, [], [], set()
        for _ in range(65):
            logits = model(step, past_key_values=cache).logits[:, -1:]
            step = logits.argmax(-1)
            tokens.append(logits)
            kept.append([layer.kept for layer in handle.report().layers])
            pointers.add(tuple(t.data_ptr() for layer in cache.layers for t in (layer.keys, layer.values)))
    assert len(pointers) == 1
    oracle = CompactionOracle(config, (40,), (0, 1, 2))
    with torch.no_grad(), compacted(model, oracle):
        cache, step = None, ids
        for expected, sets in zip(tokens, kept, strict=True):
            output = model(step, past_key_values=cache)
            cache, step = output.past_key_values, output.logits[:, -1:].argmax(-1)
            assert (output.logits[:, -1:] - expected).abs().max() <= EXACT
            for layer, positions in enumerate(sets):
                for (row, head), entries in oracle.kept[layer].items():
                    assert positions[row, head].tolist() == sorted(entries)


@every_shape
@every_stepwise_method
def test_short_prompts_grow_to_the_budget_and_stop_there(method: str, shape: str) -> None:
    model, batch, config = tiny_model("llama"), make_batch(shape, long=False), METHODS[method]()
    with llm_accel.apply(model, config, trace=True) as handle:
        tokens, logits = generate(model, batch, max_new_tokens=40)
        layers = handle.report().layers
    assert all(layer.physical_length == BUDGET + config.empty_slots for layer in layers)
    with compacted(model, CompactionOracle(config, batch.lengths, (0, 1, 2))):
        oracle_tokens, oracle_logits = generate(model, batch, max_new_tokens=40)
    assert torch.equal(tokens, oracle_tokens)
    assert (logits - oracle_logits).abs().max() <= EXACT


@pytest.mark.parametrize("mode", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}], ids=str)
@every_shape
@every_stepwise_method
def test_search_modes_with_nothing_to_cut_equal_dense(method: str, shape: str, mode: dict[str, object]) -> None:
    model, batch = tiny_model("llama"), make_batch(shape, long=True)
    dense = searched(model, batch, mode)
    with llm_accel.apply(model, METHODS[method](budget=200)):
        assert torch.equal(searched(model, batch, mode), dense)


@every_stepwise_method
def test_beams_move_scores_and_positions_with_their_rows(method: str) -> None:
    model, batch = tiny_model("llama"), make_batch("single", long=True)
    with torch.no_grad(), llm_accel.apply(model, METHODS[method](), trace=True) as handle:
        cache = handle.new_cache()
        model(batch.ids.expand(3, -1), past_key_values=cache)
        for token in range(5):
            model(torch.tensor([[5 + token], [60 + token], [90 + token]]), past_key_values=cache)
        cache.reorder_cache(torch.tensor([2, 2, 0]))
        ours = model(torch.tensor([[7], [8], [9]]), past_key_values=cache).logits
        cache = handle.new_cache()
        model(batch.ids.expand(3, -1), past_key_values=cache)
        for token in range(5):
            model(torch.tensor([[90 + token], [90 + token], [5 + token]]), past_key_values=cache)
        straight = model(torch.tensor([[7], [8], [9]]), past_key_values=cache).logits
    assert (ours - straight).abs().max() <= EXACT


@every_shape
@every_stepwise_method
def test_a_second_turn_evicts_down_to_the_budget(method: str, shape: str) -> None:
    model, batch = tiny_model("llama"), make_batch(shape, long=True)
    rows = batch.ids.shape[0]
    with torch.no_grad(), llm_accel.apply(model, METHODS[method](), trace=True) as handle:
        cache = handle.new_cache()
        first, _ = generate(model, batch, past_key_values=cache)
        mask = torch.ones_like(batch.ids) if batch.mask is None else batch.mask
        history = torch.cat([batch.ids, first, prompt(9, seed=4, batch=rows)], 1)
        history_mask = torch.cat([mask, torch.ones(rows, first.shape[1] + 9, dtype=torch.long)], 1)
        model.generate(history, attention_mask=history_mask, past_key_values=cache, max_new_tokens=4, do_sample=False)
        config = METHODS[method]()
        for layer in handle.report().layers:
            assert layer.physical_length == BUDGET + config.empty_slots
            assert layer.logical_length == history.shape[1] + 3
            last = batch.lengths[0] + first.shape[1] + 9 + 3 - 1
            assert layer.kept[0, 0, -1] == last


def test_the_matrix_has_stepwise_methods() -> None:
    assert set(STEPWISE) >= {"h2o", "streaming_llm"}


@every_stepwise_method
def test_protection_that_decoding_would_break_is_refused(method: str) -> None:
    model, ids = tiny_model("llama"), prompt(40)
    with (
        llm_accel.apply(model, METHODS[method]()),
        pytest.raises(llm_accel.UnsupportedCallError, match="evicts while decoding"),
    ):
        model.generate(ids, protect_mask=torch.ones_like(ids, dtype=torch.bool), max_new_tokens=2)
