"""The ways to call ``generate``: each is right for every method, or a clear error. Never silently different."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

import llm_accel
from llm_accel import Report
from tests.contracts.laws import EXACT, check_copied_cache, searched, two_turns
from tests.contracts.matrix import (
    AGAIN,
    LONG,
    METHODS,
    STEPWISE,
    Batch,
    acting,
    always_kept,
    check_kept,
    check_stored,
    every_method,
    every_method_that_cuts_again,
    every_prompt_method,
    every_shape,
    generate,
    make_batch,
    stored_after,
)
from tests.contracts.oracle import masked, visible_columns
from tests.tiny import prompt, tiny_model

# one family per mechanism: plain, softcap + sliding, learned sinks, shared latent index
KINDS = ("llama", "gemma2", "gpt_oss", "deepseek_v3")
every_kind = pytest.mark.parametrize("family", KINDS)


def visible_of(report: Report, batch: Batch, rows: int = 1) -> dict[int, torch.Tensor]:
    """What the oracle may see, each row repeated ``rows`` times; rows of one prompt keep the same entries."""
    kept = {layer.layer: layer.kept for layer in report.layers if layer.kept is not None}
    lengths = tuple(length for length in batch.lengths for _ in range(rows))
    return {index: visible_columns(entries, batch.ids.shape[1], lengths) for index, entries in kept.items()}


@pytest.mark.parametrize("chunk", [1, 7, 16, LONG])
@every_shape
@every_method
@every_kind
def test_chunked_prefill_keeps_the_same(family: str, method: str, shape: str, chunk: int) -> None:
    model, batch = tiny_model(family), make_batch(shape, long=True)
    with llm_accel.apply(model, METHODS[method](), trace=True) as handle:
        tokens, logits = generate(model, batch)
        whole = handle.report().layers
        chunked_tokens, chunked_logits = generate(model, batch, prefill_chunk_size=chunk)
        chunked = handle.report().layers
    assert torch.equal(tokens, chunked_tokens)
    assert (logits - chunked_logits).abs().max() <= EXACT
    for one, other in zip(whole, chunked, strict=True):
        assert one.physical_length == other.physical_length
        if one.kept is not None:
            assert torch.equal(one.kept, other.kept)


@every_shape
@every_method_that_cuts_again
@every_kind
def test_deferred_equals_eager(family: str, method: str, shape: str) -> None:
    model, batch = tiny_model(family), make_batch(shape, long=True)
    results = []
    for when in ("eager", "deferred"):
        for chunk in (None, 10):
            with llm_accel.apply(model, METHODS[method](compress=when)) as handle:
                results.append((*generate(model, batch, prefill_chunk_size=chunk), handle.report().layers))
    page = METHODS[method]().page_size or 0
    for tokens, logits, layers in results[1:]:
        assert torch.equal(tokens, results[0][0])
        assert (logits - results[0][1]).abs().max() <= EXACT
        for one, other in zip(layers, results[0][2], strict=True):
            assert (one.evicted, one.physical_length) == (other.evicted, other.physical_length)
            # pages are cut to size by eviction and grow by one for each row and head when a token finds none
            grown = page * one.dense_kv_bytes // max(1, one.logical_length)
            assert abs(one.kv_bytes - other.kv_bytes) <= grown


@every_method_that_cuts_again
@every_kind
def test_deferred_serves_a_hand_written_chunk_loop(family: str, method: str) -> None:
    model, ids = tiny_model(family), prompt(LONG)
    with llm_accel.apply(model, METHODS[method]()) as handle:
        expected = model(ids).logits[:, -1]
        eager = handle.new_cache()
        model(ids, past_key_values=eager)
        step = model(ids[:, :1], past_key_values=eager).logits
    with llm_accel.apply(model, METHODS[method](compress="deferred")) as handle:
        cache = handle.new_cache()
        for chunk in ids.split(10, dim=1):
            last = model(chunk, past_key_values=cache).logits[:, -1]
        deferred_step = model(ids[:, :1], past_key_values=cache).logits
        for layer, depth in acting(handle.report()):
            check_stored(method, layer, stored_after(method, 1, depth))
    assert (last - expected).abs().max() <= EXACT
    assert (step - deferred_step).abs().max() <= EXACT


@every_shape
@every_prompt_method
@every_kind
@pytest.mark.parametrize(
    "mode",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 20},
    ],
    ids=["beams", "beams_returned", "sampling_returned"],
)
def test_search_modes_equal_the_masked_oracle(family: str, method: str, shape: str, mode: dict[str, Any]) -> None:
    model, batch = tiny_model(family), make_batch(shape, long=True)
    rows = max(mode.get("num_beams", 1), mode["num_return_sequences"] if mode.get("do_sample") else 1)

    with llm_accel.apply(model, METHODS[method](), trace=True) as handle:
        ours = searched(model, batch, mode)
        visible = visible_of(handle.report(), batch, rows)
    dense = searched(model, batch, mode)
    with masked(model, visible):
        oracle = searched(model, batch, mode)
    assert torch.equal(ours, oracle)
    assert ours.shape[0] == dense.shape[0]


@pytest.mark.parametrize("full_ids", [True, False])
@every_shape
@every_prompt_method
@every_kind
def test_second_turn_equals_the_masked_oracle(family: str, method: str, shape: str, full_ids: bool) -> None:
    model, batch = tiny_model(family), make_batch(shape, long=True)
    with llm_accel.apply(model, METHODS[method](), trace=True) as handle:
        ours = two_turns(model, batch, handle.new_cache(), full_ids)
        visible = visible_of(handle.report(), batch)
    with masked(model, visible):
        oracle = two_turns(model, batch, DynamicCache(config=model.config), full_ids)
    for one, other in zip(ours, oracle, strict=True):
        assert (one - other).abs().max() <= EXACT


@every_shape
@every_method
@every_kind
def test_second_turn_with_nothing_to_cut_equals_dense(family: str, method: str, shape: str) -> None:
    model, batch = tiny_model(family), make_batch(shape, long=True)
    dense = two_turns(model, batch, DynamicCache(config=model.config), full_ids=True)
    with llm_accel.apply(model, METHODS[method](budget=4 * LONG)) as handle:
        ours = two_turns(model, batch, handle.new_cache(), full_ids=True)
    for one, other in zip(ours, dense, strict=True):
        assert (one - other).abs().max() <= EXACT


@every_shape
@every_method_that_cuts_again
@every_kind
def test_recompress_cuts_each_turn_back_to_the_budget(family: str, method: str, shape: str) -> None:
    model, batch = tiny_model(family), make_batch(shape, long=True)
    with llm_accel.apply(model, METHODS[method](multi_turn="recompress"), trace=True) as handle:
        two_turns(model, batch, handle.new_cache(), full_ids=True)
        report = handle.report()
    for layer, depth in acting(report):
        check_stored(method, layer, stored_after(method, 4 - 1, replace(depth, later=True)))
        kept = layer.kept[0, 0]
        assert torch.equal(kept, kept.sort().values)
        assert set(kept.tolist()) >= always_kept(METHODS[method](), layer.logical_length - 3, depth)


@every_method
def test_a_copied_cache_is_reusable_for_another_question(method: str) -> None:
    check_copied_cache(METHODS[method]())


@torch.no_grad()
@every_shape
@pytest.mark.parametrize("method", (*STEPWISE, *AGAIN))
def test_a_ratio_counts_the_tokens_seen_in_every_turn(method: str, shape: str) -> None:
    """Three turns: 0.5 of 72, of 92, and of 112 tokens, instead of half of what half of the turn before had left."""
    model, batch, new = tiny_model("llama"), make_batch(shape, long=True), 20
    turns = {} if method in STEPWISE else {"multi_turn": "recompress"}
    config = METHODS[method](budget=None, ratio=0.5, **turns)
    ids, rows = batch.ids, batch.ids.shape[0]
    mask = torch.ones_like(ids) if batch.mask is None else batch.mask
    stored: dict[tuple[int, int], int] = {}
    with llm_accel.apply(model, config, trace=True) as handle:
        cache = handle.new_cache()
        for turn in range(3):
            model(ids, attention_mask=mask, past_key_values=cache)
            for layer, depth in acting(handle.report()):
                for row, length in enumerate(batch.lengths):
                    seen, place = length + new * turn, (layer.layer, row)
                    entries = config.layer_entries(seen, replace(depth, later=turn > 0))
                    check_kept(method, layer.kept[row], entries)
                    assert entries < stored.get(place, length - new) + new
                    stored[place] = entries
            ids = prompt(new, seed=turn, batch=rows)
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)


@torch.no_grad()
@every_method_that_cuts_again
def test_a_ratio_counts_the_tokens_seen_when_deferred(method: str) -> None:
    model, ids = tiny_model("llama"), prompt(LONG)
    config = METHODS[method](budget=None, ratio=0.5, multi_turn="recompress", compress="deferred")
    with llm_accel.apply(model, config) as handle:
        cache = handle.new_cache()
        for turn in range(3):
            model(ids, past_key_values=cache)
            model(ids[:, :1], past_key_values=cache)  # evicts from all that came before it
            for layer, depth in acting(handle.report()):
                entries = config.layer_entries(layer.logical_length - 1, replace(depth, later=turn > 0))
                assert layer.evicted == layer.logical_length - entries - 1
            ids = prompt(20, seed=turn)


@every_method
def test_prompt_lookup_is_refused_and_leaves_the_model_usable(method: str) -> None:
    model, batch = tiny_model("llama"), make_batch("single", long=True)
    with llm_accel.apply(model, METHODS[method]()):
        before = generate(model, batch)
        with pytest.raises(llm_accel.UnsupportedCallError, match="prompt_lookup_num_tokens"):
            model.generate(batch.ids, max_new_tokens=3, prompt_lookup_num_tokens=2)
        assert torch.equal(generate(model, batch)[1], before[1])


@every_shape
@every_method
@every_kind
def test_inputs_embeds_equal_input_ids(family: str, method: str, shape: str) -> None:
    model, batch = tiny_model(family), make_batch(shape, long=True)
    mask = torch.ones_like(batch.ids) if batch.mask is None else batch.mask
    embeds = model.get_input_embeddings()(batch.ids)
    with llm_accel.apply(model, METHODS[method]()):
        tokens, _ = generate(model, batch)
        from_embeds = model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(tokens, from_embeds)


@every_prompt_method
def test_protected_tokens_stay(method: str) -> None:
    model, batch = tiny_model("llama"), make_batch("padded", long=True)
    protect = torch.zeros_like(batch.ids, dtype=torch.bool)
    protect[:, -20:-14] = True
    protect &= batch.mask.bool()
    with llm_accel.apply(model, METHODS[method](), trace=True) as handle:
        model.generate(batch.ids, attention_mask=batch.mask, protect_mask=protect, max_new_tokens=2, do_sample=False)
        for layer in handle.report().layers:
            for row, length in enumerate(batch.lengths):
                wanted = set((protect[row].nonzero()[:, 0] - (LONG - length)).tolist())
                for head in layer.kept[row]:
                    assert wanted <= set(head.tolist())
        with pytest.raises(llm_accel.ConfigError, match="protect"):
            model.generate(batch.ids, attention_mask=batch.mask, protect_mask=batch.mask.bool(), max_new_tokens=2)
