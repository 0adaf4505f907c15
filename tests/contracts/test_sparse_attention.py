"""The contracts of methods that compute attention: exact where nothing is left out, and the cache stays whole."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import llm_accel
from llm_accel import HiP, SnapKV
from llm_accel.methods.sparse import hip
from tests.contracts.matrix import LONG, NEW, Batch, every_family, every_shape, generate, make_batch
from tests.tiny import FAMILIES, prompt, tiny_model

EXACT = 1e-5
KINDS = ("llama", "gemma2", "gpt_oss", "deepseek_v3")
every_kind = pytest.mark.parametrize("family", KINDS)
# the selectors differ in kernels alone, so that one family tells whether the others work too
SEARCHED = [(family, "stages") for family in FAMILIES] + [("llama", "tree"), ("llama", "exact")]
every_search = pytest.mark.parametrize(("family", "selector"), SEARCHED)


def sparse(**changes: Any) -> HiP:
    """Reads 41 of the 72 tokens."""
    options: dict[str, Any] = {
        "sink": 8,
        "window": 17,
        "budget": 16,
        "edge_layers": (),
        "stages": ((16, None, 2), (8, 64, 1)),
        "block_q": 16,
        "refresh": (4, 2),
        "min_prefill_len": 0,
    }
    return HiP(**(options | changes))


def covering(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> HiP:
    """A budget for everything, computed sparsely all the same."""
    monkeypatch.setattr(hip, "reach", lambda search: 0)
    return sparse(**({"budget": 256, "stages": ((16, None, 2), (8, 256, 1))} | changes))


def calls(handle: llm_accel.Handle) -> int:
    """Attention calls that were sparse in the last call."""
    return sum(layer.sparse_calls for layer in handle.report().layers)


@every_shape
@every_family
def test_nothing_to_leave_out_changes_nothing(family: str, shape: str) -> None:
    model, batch = tiny_model(family), make_batch(shape, long=True)
    tokens, logits = generate(model, batch)
    for config in (sparse(budget=64), sparse(min_prefill_len=LONG + 1, window=LONG), HiP()):
        with llm_accel.apply(model, config) as handle:
            ours, our_logits = generate(model, batch)
            assert calls(handle) == 0
            assert any("every attention call was dense" in text for text in handle.report().warnings)
        assert torch.equal(ours, tokens)
        assert torch.equal(our_logits, logits)


@every_shape
@every_search
@pytest.mark.parametrize("chunk", [None, 20])
def test_a_budget_for_everything_is_dense(
    family: str, shape: str, selector: str, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = tiny_model(family), make_batch(shape, long=True)
    tokens, logits = generate(model, batch, max_new_tokens=9)
    with llm_accel.apply(model, covering(monkeypatch, selector=selector)) as handle:
        ours, our_logits = generate(model, batch, max_new_tokens=9, prefill_chunk_size=chunk)
        acting = [layer for layer in handle.report().layers if layer.skipped_reason is None]
        assert acting
        assert all(layer.sparse_calls == 8 + (1 if chunk is None else -(-LONG // chunk)) for layer in acting)
    assert torch.equal(ours, tokens)
    assert (our_logits - logits).abs().max() <= EXACT


@every_shape
@every_family
def test_undo_is_exact(family: str, shape: str) -> None:
    model, batch = tiny_model(family), make_batch(shape, long=True)
    config, attributes = copy.deepcopy(model.config.to_dict()), set(model.__dict__)
    before = generate(model, batch)
    handle = llm_accel.apply(model, sparse())
    assert not torch.equal(generate(model, batch)[1], before[1])
    handle.remove()
    after = generate(model, batch)
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1])
    assert model.config.to_dict() == config
    assert set(model.__dict__) == attributes


@every_shape
@every_family
def test_the_cache_stays_whole(family: str, shape: str) -> None:
    model, batch = tiny_model(family), make_batch(shape, long=True)
    with llm_accel.apply(model, sparse()) as handle:
        generate(model, batch)
        report = handle.report()
    assert report.backends["cache"][0] == "whole"
    assert {"selection", "sparse"} <= set(report.backends)
    assert report.kv_bytes == report.dense_kv_bytes > 0
    for layer in report.layers:
        assert layer.evicted == 0
        assert layer.sparse_calls == (NEW if layer.skipped_reason is None else 0)


@every_search
def test_rows_are_independent(family: str, selector: str) -> None:
    steps = 20  # the short rows grow past the budget while decoding
    model, batch = tiny_model(family), make_batch("padded", long=True)
    with llm_accel.apply(model, sparse(selector=selector)):
        tokens, logits = generate(model, batch, max_new_tokens=steps)
        for index, length in enumerate(batch.lengths):
            alone = generate(model, Batch(batch.row(index), None, (length,)), max_new_tokens=steps)
            assert torch.equal(tokens[index], alone[0][0])
            assert (logits[index] - alone[1][0]).abs().max() <= EXACT


def test_rows_below_the_shortest_prompt_are_dense() -> None:
    model, batch = tiny_model("llama"), make_batch("padded", long=True)
    with llm_accel.apply(model, sparse(min_prefill_len=50, window=17, budget=8)):
        tokens, logits = generate(model, batch)
        for index, length in enumerate(batch.lengths):
            alone = generate(model, Batch(batch.row(index), None, (length,)))
            assert torch.equal(tokens[index], alone[0][0])
            assert (logits[index] - alone[1][0]).abs().max() <= EXACT


@every_shape
@every_family
def test_no_memory_between_calls(family: str, shape: str) -> None:
    model, first, other = tiny_model(family), make_batch(shape, long=True), make_batch(shape, long=False)
    with llm_accel.apply(model, sparse()):
        once = generate(model, first)
        generate(model, other)
        twice = generate(model, first)
    assert torch.equal(once[0], twice[0])
    assert torch.equal(once[1], twice[1])


@every_kind
@pytest.mark.parametrize(
    "mode",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 20},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=["beams", "beams_returned", "sampling_returned", "prompt_lookup"],
)
def test_search_modes_with_a_budget_for_everything_are_dense(
    family: str, mode: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family)
    ids = prompt(12).repeat(1, 6)

    def sequences() -> torch.Tensor:
        torch.manual_seed(5)
        return model.generate(ids, **({"max_new_tokens": 12, "do_sample": False} | mode))

    dense = sequences()
    with llm_accel.apply(model, covering(monkeypatch)) as handle:
        assert torch.equal(sequences(), dense)
        assert calls(handle)


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])  # sliding layers cannot be rolled back by hand
def test_proposals_see_what_they_see_one_by_one(family: str) -> None:
    """Two proposals after a rolled back one, against a fresh cache."""
    model, ids = tiny_model(family), prompt(LONG + 6)
    with torch.no_grad(), llm_accel.apply(model, sparse()) as handle:
        cache, fresh = handle.new_cache(), handle.new_cache()
        model(ids[:, :LONG], past_key_values=cache)
        model(ids[:, LONG : LONG + 1], past_key_values=cache)
        model(ids[:, LONG : LONG + 3], past_key_values=cache)
        cache.crop(-4)
        model(ids[:, :LONG], past_key_values=fresh)
        for step in range(LONG, LONG + 6):
            one, other = (model(ids[:, step : step + 1], past_key_values=held).logits for held in (cache, fresh))
            assert torch.equal(one, other)


def second_turn(model: PreTrainedModel, batch: Batch, cache: Any, full_ids: bool) -> torch.Tensor:
    """Logits of a second question on the same cache."""
    mask = torch.ones_like(batch.ids) if batch.mask is None else batch.mask
    first, _ = generate(model, batch, past_key_values=cache)
    question = prompt(9, seed=7, batch=len(batch.ids))
    history = torch.cat([batch.ids, first, question], dim=1)
    history_mask = torch.cat([mask, torch.ones(len(mask), first.shape[1] + 9, dtype=mask.dtype)], dim=1)
    given = history if full_ids else history[:, cache.get_seq_length() :]
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return torch.stack(
        model.generate(given, attention_mask=history_mask, past_key_values=cache, **options).logits, dim=1
    )


@every_shape
@every_kind
def test_second_turns(family: str, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_model(family), make_batch(shape, long=True)
    with llm_accel.apply(model, sparse()) as handle:
        whole, rest = (second_turn(model, batch, handle.new_cache(), full_ids) for full_ids in (True, False))
        assert torch.equal(whole, rest)
    with llm_accel.apply(model, covering(monkeypatch)) as handle:
        ours = second_turn(model, batch, handle.new_cache(), False)
    with llm_accel.apply(model, SnapKV(budget=1000)) as handle:  # keeps everything, and positions as a cache does
        dense = second_turn(model, batch, handle.new_cache(), False)
    assert (ours - dense).abs().max() <= EXACT


@torch.no_grad()
@every_shape
def test_a_cache_from_disk_or_a_copy_goes_on_as_the_original(tmp_path: Path, shape: str) -> None:
    model, batch = tiny_model("llama"), make_batch(shape, long=True)
    with llm_accel.apply(model, sparse()) as handle:
        cache = handle.new_cache()
        generate(model, batch, past_key_values=cache)
        handle.save_cache(cache, tmp_path / "cache")
        others = [handle.load_cache(tmp_path / "cache"), copy.deepcopy(cache)]
        for step in range(5):  # some steps choose anew, some reuse the choice
            token = prompt(1, seed=step, batch=len(batch.ids))
            expected = model(token, past_key_values=cache).logits
            for other in others:
                assert torch.equal(model(token, past_key_values=other).logits, expected)


def test_without_a_cache_attention_is_sparse_too() -> None:
    model, ids = tiny_model("llama"), prompt(LONG)
    dense = model(ids).logits
    with llm_accel.apply(model, sparse()):
        with_cache = model(ids).logits
        assert torch.equal(model(ids, use_cache=False).logits, with_cache)
    assert not torch.equal(dense, with_cache)


def test_dense_layers_are_left_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_model("llama"), make_batch("single", long=True)
    with llm_accel.apply(model, sparse(dense_layers=(0, -1))) as handle:
        generate(model, batch)
        layers = handle.report().layers
    assert [layer.skipped_reason for layer in layers] == ["named in dense_layers", None, "named in dense_layers"]
    assert [layer.sparse_calls for layer in layers] == [0, NEW, 0]
    with pytest.raises(llm_accel.ConfigError, match=r"dense_layers.*layer 3.*3 layers"):
        llm_accel.apply(model, sparse(dense_layers=(3,)))


def test_edge_layers_have_a_budget_of_their_own() -> None:
    config = sparse(edge_layers=(0, 1, 2, -1))
    assert [config.budget_of(layer, 6) for layer in range(6)] == [32, 32, 32, 16, 16, 32]
    assert [config.budget_of(layer, 2) for layer in range(2)] == [32, 32]
    assert sparse(edge_layers=(0,), budget_edge=64).budget_of(0, 6) == 64


@every_kind
def test_sparse_attention_over_a_compressed_prompt(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_model(family), make_batch("padded", long=True)
    snapkv = SnapKV(budget=48, window=8)
    with llm_accel.apply(model, snapkv):
        tokens, logits = generate(model, batch)
    with llm_accel.apply(model, [snapkv, sparse()]) as handle:
        generate(model, batch)
        report = handle.report()
        for layer in report.layers:
            if layer.skipped_reason is None:
                assert layer.evicted == LONG - 48
                assert layer.sparse_calls == NEW
    with llm_accel.apply(model, [snapkv, covering(monkeypatch)]):
        ours, our_logits = generate(model, batch)
    assert torch.equal(ours, tokens)
    assert (our_logits - logits).abs().max() <= EXACT


def test_what_cannot_be_combined_is_refused() -> None:
    model = tiny_model("llama")
    for other in ("h2o", "streaming_llm", "adakv"):
        with pytest.raises(llm_accel.ConfigError, match=rf"order of their positions.*{other}"):
            llm_accel.apply(model, [other, "hip"])
    with pytest.raises(llm_accel.ConfigError, match="both compute attention"):
        llm_accel.apply(model, ["hip", sparse()])
    with pytest.raises(llm_accel.ConfigError, match=r"retrieval_heads.*cannot be combined"):
        llm_accel.apply(model, ["hip", "retrieval_heads"])
