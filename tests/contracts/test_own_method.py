"""A method that a user writes as a score and nothing else passes the invariants: the base does the rest."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

import llm_accel
from llm_accel import SnapKV, UnsupportedCallError
from llm_accel.methods import PromptCompression, PromptView, catalog
from llm_accel.registry import parse
from tests.contracts.laws import (
    EXACT,
    check_copied_cache,
    check_going_past_raises,
    check_no_memory,
    check_nothing_to_cut,
    check_undo,
    two_turns,
)
from tests.contracts.matrix import (
    BUDGET,
    LONG,
    NEW,
    Batch,
    every_family,
    every_shape,
    generate,
    make_batch,
)
from tests.contracts.oracle import masked, visible_columns
from tests.pages import tutorial_method
from tests.tiny import tiny_model

KeyNorm = tutorial_method()


def smallest_norms(
    model: PreTrainedModel, batch: Batch, layer: int, first: Tensor | None = None
) -> list[list[set[int]]]:
    """Original positions of the BUDGET smallest key norms of the dense model, per row and head; those under ``first``,
    bool [B, n], before all others."""
    cache = DynamicCache(config=model.config)
    generate(model, batch, past_key_values=cache, max_new_tokens=1)
    norms = cache.layers[layer].keys.float().norm(dim=-1)
    if first is not None:
        norms = norms.masked_fill(first[:, None], 0.0)
    rows = []
    for row, length in zip(norms, batch.lengths, strict=True):
        real = row[:, LONG - length :]
        rows.append([set(head.topk(min(BUDGET, length), largest=False).indices.tolist()) for head in real])
    return rows


@every_shape
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_it_keeps_what_it_says(family: str, shape: str) -> None:
    model, batch = tiny_model(family), make_batch(shape, long=True)
    with llm_accel.apply(model, KeyNorm(budget=BUDGET), trace=True) as handle:
        generate(model, batch)
        layers = [layer for layer in handle.report().layers if layer.kept is not None]
    assert layers
    for layer in layers:
        kept = [[{slot for slot in head if slot >= 0} for head in row] for row in layer.kept.tolist()]
        assert kept == smallest_norms(model, batch, layer.layer)


def test_protected_tokens_stay_and_the_smallest_norms_beside_them() -> None:
    model, batch = tiny_model("llama"), make_batch("padded", long=True)
    protect = torch.zeros_like(batch.ids, dtype=torch.bool)
    protect[:, -14:-8] = True
    with llm_accel.apply(model, KeyNorm(budget=BUDGET), trace=True) as handle:
        generate(model, batch, protect_mask=protect)
        layers = handle.report().layers
    for layer in layers:
        kept = [[{slot for slot in head if slot >= 0} for head in row] for row in layer.kept.tolist()]
        assert kept == smallest_norms(model, batch, layer.layer, protect)


@every_shape
@every_family
def test_evicted_is_masked(family: str, shape: str) -> None:
    model, batch = tiny_model(family), make_batch(shape, long=True)
    with llm_accel.apply(model, KeyNorm(budget=BUDGET), trace=True) as handle:
        tokens, logits = generate(model, batch)
        kept = {layer.layer: layer.kept for layer in handle.report().layers if layer.kept is not None}
    with masked(model, {layer: visible_columns(entries, LONG, batch.lengths) for layer, entries in kept.items()}):
        expected, expected_logits = generate(model, batch)
    assert torch.equal(tokens, expected)
    assert (logits - expected_logits).abs().max() <= EXACT


@pytest.mark.parametrize(
    "method", ["key_norm", "pyramidkv:base=key_norm,beta=2", "adakv:base=key_norm,page=8", "adakv:base=random:window=8"]
)
@every_shape
@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_the_laws_of_every_method(family: str, shape: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a score alone, and of the divisions of a budget with it."""
    monkeypatch.setitem(catalog._registered, "key_norm", KeyNorm)
    parsed = parse(method)
    assert isinstance(parsed, PromptCompression)
    model, batch, config = tiny_model(family), make_batch(shape, long=True), replace(parsed, budget=BUDGET)
    check_nothing_to_cut(model, batch, replace(parsed, budget=LONG + NEW))
    check_nothing_to_cut(model, make_batch(shape, long=False), config)
    check_undo(family, batch, config)
    check_no_memory(model, shape, config)
    check_copied_cache(config)
    check_going_past_raises(config)


@pytest.mark.parametrize("changes", [{}, {"compress": "deferred"}, {"multi_turn": "recompress"}])
@every_shape
def test_chunks_rows_and_turns(shape: str, changes: dict[str, str]) -> None:
    model, batch, config = tiny_model("llama"), make_batch(shape, long=True), KeyNorm(budget=BUDGET, **changes)
    with llm_accel.apply(model, config, trace=True) as handle:
        tokens, logits = generate(model, batch)
        kept = handle.report().layers[0].kept
        chunked, _ = generate(model, batch, prefill_chunk_size=7)
        assert torch.equal(chunked, tokens)
        assert torch.equal(handle.report().layers[0].kept, kept)
        for index, length in enumerate(batch.lengths):
            alone, alone_logits = generate(model, Batch(batch.row(index), None, (length,)))
            assert torch.equal(alone[0], tokens[index])
            assert (alone_logits[0] - logits[index]).abs().max() <= EXACT
        first, second = two_turns(model, batch, handle.new_cache(), full_ids=True)
        assert torch.equal(first, logits)
        again = two_turns(model, batch, handle.new_cache(), full_ids=False)[1]
    assert (second - again).abs().max() <= EXACT


class Oldest(SnapKV):
    """Chooses in a way of its own, which knows nothing of what is protected."""

    name = "oldest"

    def select(self, view: PromptView) -> Tensor:
        return torch.arange(self.budget).expand(*view.key.shape[:2], -1)


def test_a_choice_of_its_own_that_loses_protected_tokens_is_refused() -> None:
    model, batch = tiny_model("llama"), make_batch("single", long=True)
    with llm_accel.apply(model, Oldest(budget=BUDGET, window=8)):
        for protected, refused in ((3, False), (BUDGET, True)):
            protect = torch.zeros_like(batch.ids, dtype=torch.bool)
            protect[:, protected] = True
            if not refused:
                generate(model, batch, protect_mask=protect)
                continue
            with pytest.raises(UnsupportedCallError, match=r"oldest:.*row 0 go in layer 0.*Oldest overrides `select`"):
                generate(model, batch, protect_mask=protect)
        generate(model, batch)
