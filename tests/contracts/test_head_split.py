"""The invariants of methods that give each KV head of a layer its own share of the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

import llm_accel
from llm_accel import RetrievalHeads
from tests.contracts.head_oracle import HeadOracle, split_heads
from tests.contracts.laws import (
    EXACT,
    check_copied_cache,
    check_going_past_raises,
    check_no_memory,
    check_nothing_to_cut,
    check_undo,
    searched,
    two_turns,
)
from tests.contracts.matrix import LONG, NEW, every_shape, generate, make_batch
from tests.tiny import FAMILIES, prompt, tiny_model

SINKS, RECENT = 3, 12
FULL = ("0.1", "1.0", "2.0", "2.1")  # of two KV heads: one, one, both
every_split_family = pytest.mark.parametrize("family", [name for name in FAMILIES if name != "deepseek_v3"])
every_kind = pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
every_prefill = pytest.mark.parametrize("prefill", ["dense", "lambda"])


def split(**changes: Any) -> RetrievalHeads:
    return RetrievalHeads(**({"head_list": FULL, "sinks": SINKS, "recent": RECENT} | changes))


def acted_on(report: llm_accel.Report) -> tuple[int, ...]:
    return tuple(layer.layer for layer in report.layers if layer.skipped_reason is None)


@every_shape
@every_prefill
@every_split_family
def test_generation_equals_the_masked_oracle(family: str, prefill: str, shape: str) -> None:
    model, batch = tiny_model(family), make_batch(shape, long=True)
    config = split(prefill=prefill)
    with llm_accel.apply(model, config) as handle:
        tokens, logits = generate(model, batch, max_new_tokens=17)
        acted = acted_on(handle.report())
    with split_heads(model, HeadOracle(config, batch.lengths, acted)):
        oracle_tokens, oracle_logits = generate(model, batch, max_new_tokens=17)
    assert torch.equal(tokens, oracle_tokens)
    assert (logits - oracle_logits).abs().max() <= EXACT


@every_shape
@every_prefill
@every_split_family
def test_nothing_to_cut_changes_nothing(family: str, prefill: str, shape: str) -> None:
    model, batch = tiny_model(family), make_batch(shape, long=True)
    check_nothing_to_cut(model, batch, split(recent=LONG + NEW - SINKS, prefill=prefill))
    check_nothing_to_cut(model, batch, RetrievalHeads(full=1.0, sinks=SINKS, recent=RECENT, prefill=prefill))


@every_shape
@every_split_family
def test_undo_is_exact(family: str, shape: str) -> None:
    check_undo(family, make_batch(shape, long=True), split())


@every_shape
@every_prefill
@every_split_family
def test_bytes_equal_the_formula(family: str, prefill: str, shape: str) -> None:
    model, batch = tiny_model(family), make_batch(shape, long=True)
    with llm_accel.apply(model, split(prefill=prefill)) as handle:
        cache = handle.new_cache()
        generate(model, batch, past_key_values=cache)
        report = handle.report()
    seen = LONG + NEW - 1
    for layer, stored in zip(report.layers, cache.layers, strict=True):
        if layer.skipped_reason is not None:
            continue
        full = sum(name.startswith(f"{layer.layer}.") for name in FULL)
        one = stored.groups[0].store.keys
        entry = len(batch.ids) * 2 * one.shape[-1] * one.element_size()  # of one head: key and value
        assert layer.kv_bytes == entry * (full * seen + (2 - full) * (SINKS + RECENT))
        assert layer.dense_kv_bytes == entry * 2 * seen
        assert layer.logical_length == stored.get_seq_length() == seen
        assert layer.physical_length == seen
        assert layer.evicted == ((2 - full) * (seen - SINKS - RECENT)) // 2


@every_shape
@every_prefill
@pytest.mark.parametrize("chunk", [1, 7, 16, LONG])
@every_kind
def test_chunked_prefill_is_the_same(family: str, chunk: int, prefill: str, shape: str) -> None:
    model, batch = tiny_model(family), make_batch(shape, long=True)
    with llm_accel.apply(model, split(prefill=prefill), trace=True) as handle:
        tokens, logits = generate(model, batch)
        whole = handle.report().layers
        chunked_tokens, chunked_logits = generate(model, batch, prefill_chunk_size=chunk)
        chunked = handle.report().layers
    assert torch.equal(tokens, chunked_tokens)
    assert (logits - chunked_logits).abs().max() <= EXACT
    for one, other in zip(whole, chunked, strict=True):
        assert one.kv_bytes == other.kv_bytes
        assert one.kept is None or torch.equal(one.kept, other.kept)


@every_shape
@pytest.mark.parametrize("chunk", [1, 5, 16, LONG])
@pytest.mark.parametrize("prefill", ["dense", "chunk", "lambda"])
def test_streaming_heads_hold_sinks_and_recent_tokens(prefill: str, chunk: int, shape: str) -> None:
    model, batch = tiny_model("llama"), make_batch(shape, long=True)
    with llm_accel.apply(model, split(prefill=prefill), trace=True) as handle:
        generate(model, batch, prefill_chunk_size=chunk)
        for layer in handle.report().layers:
            for row, length in enumerate(batch.lengths):
                seen = length + NEW - 1
                for head, kept in enumerate(layer.kept[row].tolist()):
                    full = f"{layer.layer}.{head}" in FULL
                    expected = [p for p in range(seen) if full or p < SINKS or seen - p <= RECENT]
                    assert [position for position in kept if position >= 0] == expected


@torch.no_grad()
def test_worked_example_of_the_three_prefills() -> None:
    """Two sinks, three recent entries, ten tokens in chunks of six and four."""
    model, ids = tiny_model("llama"), prompt(10)
    stream = {"head_list": (), "full": 0.0, "sinks": 2, "recent": 3}
    last = {}
    for prefill in ("dense", "chunk", "lambda"):
        with llm_accel.apply(model, RetrievalHeads(**stream, prefill=prefill), trace=True) as handle:
            cache = handle.new_cache()
            model(ids[:, :6], past_key_values=cache)
            assert handle.report().layers[0].kept[0, 0].tolist() == [0, 1, 3, 4, 5]
            last[prefill] = model(ids[:, 6:], past_key_values=cache).logits[:, -1]
            assert handle.report().layers[0].kept[0, 0].tolist() == [0, 1, 7, 8, 9]
    assert torch.equal(last["dense"], last["chunk"])  # without generate each call is a prompt of its own
    assert not torch.allclose(last["chunk"], last["lambda"])


@torch.no_grad()
def test_one_chunk_equals_dense_prefill_and_more_do_not() -> None:
    model, batch = tiny_model("llama"), make_batch("single", long=True)
    results = {}
    for prefill, size in (("dense", 16), ("chunk", None), ("chunk", 16), ("lambda", None)):
        with llm_accel.apply(model, split(prefill=prefill)):
            results[prefill, size] = generate(model, batch, prefill_chunk_size=size)[1]
    assert (results["dense", 16] - results["chunk", None]).abs().max() <= EXACT
    assert (results["chunk", 16] - results["chunk", None]).abs().max() > EXACT
    assert (results["chunk", 16] - results["lambda", None]).abs().max() > EXACT


@pytest.mark.parametrize("prefill", ["dense", "chunk", "lambda"])
@every_split_family
def test_rows_are_independent(family: str, prefill: str) -> None:
    model, batch = tiny_model(family), make_batch("padded", long=True)
    options = {"prefill_chunk_size": 70} if prefill == "chunk" else {}
    with llm_accel.apply(model, split(prefill=prefill)):
        tokens, logits = generate(model, batch, **options)
        for index, length in enumerate(batch.lengths):
            row = type(batch)(batch.row(index), None, (length,))
            # the same seam between chunks, counted from the end
            alone_options = {"prefill_chunk_size": length - 2} if options else {}
            alone_tokens, alone_logits = generate(model, row, **alone_options)
            assert torch.equal(tokens[index], alone_tokens[0])
            assert (logits[index] - alone_logits[0]).abs().max() <= EXACT


@every_shape
@every_prefill
def test_no_memory_between_calls(prefill: str, shape: str) -> None:
    check_no_memory(tiny_model("llama"), shape, split(prefill=prefill))


@pytest.mark.parametrize(
    "mode",
    [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3}],
    ids=str,
)
@every_shape
@every_kind
def test_search_modes_equal_the_oracle(family: str, shape: str, mode: dict[str, Any]) -> None:
    model, batch, config = tiny_model(family), make_batch(shape, long=True), split()

    with llm_accel.apply(model, config) as handle:
        ours = searched(model, batch, mode)
        acted = acted_on(handle.report())
    with split_heads(model, HeadOracle(config, batch.lengths, acted)):
        assert torch.equal(ours, searched(model, batch, mode))


@pytest.mark.parametrize("full_ids", [True, False])
@every_shape
@every_kind
def test_second_turn_with_lambda_equals_the_oracle(family: str, shape: str, full_ids: bool) -> None:
    model, batch, config = tiny_model(family), make_batch(shape, long=True), split(prefill="lambda")
    with llm_accel.apply(model, config) as handle:
        ours = two_turns(model, batch, handle.new_cache(), full_ids)
        acted = acted_on(handle.report())
    with split_heads(model, HeadOracle(config, batch.lengths, acted)):
        oracle = two_turns(model, batch, DynamicCache(config=model.config), full_ids)
    for one, other in zip(ours, oracle, strict=True):
        assert (one - other).abs().max() <= EXACT


@every_shape
def test_second_turn_keeps_full_heads_whole_and_streams_bounded(shape: str) -> None:
    model, batch = tiny_model("llama"), make_batch(shape, long=True)
    with llm_accel.apply(model, split()) as handle:
        cache = handle.new_cache()
        two_turns(model, batch, cache, full_ids=True)
        for layer in cache.layers:
            for group in layer.groups:
                wanted = cache.get_seq_length() if group is layer.full else SINKS + RECENT
                assert group.store.physical_length() == wanted


def test_a_copied_cache_is_reusable_for_another_question() -> None:
    check_copied_cache(split())


@torch.no_grad()
@every_shape
def test_a_cache_from_disk_answers_the_same(tmp_path: Path, shape: str) -> None:
    model, batch = tiny_model("llama"), make_batch(shape, long=True)
    with llm_accel.apply(model, split()) as handle:
        cache = handle.new_cache()
        generate(model, batch, past_key_values=cache)
        handle.save_cache(cache, tmp_path / "cache")
        loaded = handle.load_cache(tmp_path / "cache")
        question = prompt(5, seed=8, batch=len(batch.ids))
        assert torch.equal(
            model(question, past_key_values=cache).logits, model(question, past_key_values=loaded).logits
        )


def test_snapkv_on_the_full_heads() -> None:
    model, batch = tiny_model("llama"), make_batch("padded", long=True)
    with llm_accel.apply(model, split(full_budget=40), trace=True) as handle:
        cache = handle.new_cache()
        generate(model, batch, past_key_values=cache)
        for index, layer in enumerate(cache.layers):
            assert layer.full.store.physical_length() == 40 + NEW - 1
            kept = handle.report().layers[index].kept[0, layer.full.heads[0]]
            assert set(range(LONG - 32, LONG + NEW - 1)) <= set(kept.tolist())


def test_what_cannot_work_is_refused() -> None:
    model, batch = tiny_model("llama"), make_batch("single", long=True)
    with pytest.raises(llm_accel.UnsupportedModelError, match="one latent for all heads"):
        llm_accel.apply(tiny_model("deepseek_v3"), RetrievalHeads(full=1.0))
    with pytest.raises(llm_accel.ConfigError, match="full_budget"):
        llm_accel.apply(model, [split(), llm_accel.SnapKV()])
    with llm_accel.apply(model, split()):
        with pytest.raises(llm_accel.UnsupportedCallError, match="prompt_lookup_num_tokens"):
            model.generate(batch.ids, max_new_tokens=3, prompt_lookup_num_tokens=2)
        with pytest.raises(llm_accel.ConfigError, match="protect_mask"):
            model.generate(batch.ids, max_new_tokens=3, protect_mask=torch.ones_like(batch.ids))


def test_a_layer_that_goes_past_the_plug_in_raises() -> None:
    check_going_past_raises(split())
