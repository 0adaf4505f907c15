"""Contexts that the model reads a second time before all layers evict together."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

import llm_accel
from llm_accel import KVzip, UnsupportedCallError
from llm_accel.cache import AccelLayer, RaggedLayer
from llm_accel.cache.linear import states_of
from llm_accel.common.bundled import load_needle_model
from llm_accel.eval.prompts import grammar
from llm_accel.eval.prompts.encoding import Encoder
from llm_accel.methods import Lead
from llm_accel.patches.context import Context
from tests.contracts.laws import EXACT, check_no_memory, check_nothing_to_cut, check_undo, two_turns
from tests.contracts.matrix import LONG, NEW, Batch, generate, make_batch, pages_held
from tests.contracts.oracle import masked, visible_columns
from tests.contracts.plain_attention import attention_output, attention_weights, running
from tests.families.build import text_model
from tests.tiny import prompt, tiny_model

KINDS = ("llama", "gemma2", "gpt_oss", "deepseek_v3")
every_kind = pytest.mark.parametrize("family", KINDS)
every_shape = pytest.mark.parametrize("shape", ["single", "padded"])
every_division = pytest.mark.parametrize("division", ["tokens", "global", "layer", "head"])
LEAD = 8


def small(division: str = "global", **changes: Any) -> KVzip:
    return KVzip(**({"budget": 24, "page": 8, "chunk": 30, "division": division} | changes))


class Capturing:
    """Plain attention that remembers queries and keys of each layer, in float64."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[Tensor, Tensor, dict[str, Any]]] = {}

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        self.seen[module.layer_idx] = query.double(), key.double(), kwargs
        return attention_output(attention_weights(query, key, attention_mask, None, kwargs), value), None


def written_out(
    model: PreTrainedModel, row: Tensor, config: KVzip, layers: dict[int, int], head: int = 0
) -> dict[int, Tensor]:
    """Scores of one context [1, n] by layer, float64 [Hk, n], from plain calls of the stock model on the context and
    what is read again behind it; ``layers``: KV heads of the layers that are scored; ``head``: tokens at the beginning
    that are not read again."""
    length, scores = row.shape[1], {}
    for first in range(head, length, config.chunk):
        last = min(first + config.chunk, length)
        told = torch.tensor([config.lead().first], dtype=torch.long)
        again = torch.cat([told, row[:, max(head, first - LEAD) : last]], dim=1)
        capturing = Capturing()
        with torch.no_grad(), running(model, capturing):
            model(torch.cat([row, again], dim=1), use_cache=False)
        for index, heads in layers.items():
            query, key, kwargs = capturing.seen[index]
            query, key = query[0, :, length:], key[0].repeat_interleave(query.shape[1] // key.shape[1], 0)
            logits = query @ key.transpose(1, 2) * kwargs["scaling"]
            if kwargs.get("softcap") is not None:
                logits = torch.tanh(logits / kwargs["softcap"]) * kwargs["softcap"]
            slot, own = torch.arange(key.shape[1]), length + torch.arange(query.shape[1])[:, None]
            shown = (slot < config.sinks) | ((slot >= first) & (slot < last)) | ((slot >= length) & (slot <= own))
            logits = logits.masked_fill(~shown, float("-inf"))
            if kwargs.get("s_aux") is not None:
                sink = kwargs["s_aux"].double()[:, None, None].expand(-1, logits.shape[1], 1)
                logits = torch.cat([logits, sink], dim=-1)
            most = logits.detach().softmax(-1)[..., first:last].amax(1).view(heads, -1, last - first).amax(1)
            scores.setdefault(index, torch.zeros(heads, length, dtype=torch.float64))[:, first:last] = most
    return scores


def best(scores: dict[int, Tensor], config: KVzip, length: int) -> set[tuple[int, int, int]]:
    """Layer, head and place of what stays, when all share one budget."""
    worth = {
        (layer, head, place): (place < config.sinks, float(score[head, place]))
        for layer, score in scores.items()
        for head in range(len(score))
        for place in range(length)
    }
    heads = sum(len(score) for score in scores.values())
    return set(sorted(worth, key=worth.__getitem__, reverse=True)[: heads * config.entries(length)])


@pytest.mark.parametrize("told", ["none", (5, 6, 7)], ids=str)
@every_shape
@every_kind
def test_what_stays_is_what_the_paper_keeps(family: str, shape: str, told: Any) -> None:
    model, batch, config = tiny_model(family), make_batch(shape, long=True), small(prompt=told)
    with llm_accel.apply(model, config, trace=True) as handle:
        generate(model, batch)
        kept = {layer.layer: layer.kept for layer in handle.report().layers if layer.kept is not None}
    for row, length in enumerate(batch.lengths):
        found = {
            (layer, head, place)
            for layer, entries in kept.items()
            for head, places in enumerate(entries[row].tolist())
            for place in places
            if place >= 0
        }
        scores = written_out(model, batch.row(row), config, {index: k.shape[1] for index, k in kept.items()})
        assert found == best(scores, config, length)


@pytest.mark.parametrize("embedded", [False, True])
def test_the_head_of_a_chat_template_is_not_read_again(embedded: bool) -> None:
    model, batch, config = tiny_model("llama"), make_batch("single", long=True), small()
    lead, ids = Lead(head=tuple(batch.ids[0, :7].tolist())), batch.ids
    inputs = {"inputs_embeds": model.get_input_embeddings()(ids)} if embedded else {"input_ids": ids}
    with torch.no_grad(), llm_accel.apply(model, config, trace=True) as handle:
        object.__setattr__(handle._hook.plan, "lead", lead)
        model(**inputs, past_key_values=handle.new_cache())
        kept = {layer.layer: layer.kept for layer in handle.report().layers}
    scores = written_out(model, ids, config, {index: k.shape[1] for index, k in kept.items()}, head=7)
    assert {
        (layer, head, place)
        for layer, entries in kept.items()
        for head, places in enumerate(entries[0].tolist())
        for place in places
        if place >= 0
    } == best(scores, config, LONG)


@every_shape
@every_division
@every_kind
def test_evicted_is_masked_and_rows_are_independent(family: str, division: str, shape: str) -> None:
    model, batch = tiny_model(family), make_batch(shape, long=True)
    with llm_accel.apply(model, small(division), trace=True) as handle:
        tokens, logits = generate(model, batch)
        kept = {layer.layer: layer.kept for layer in handle.report().layers if layer.kept is not None}
        for row, length in enumerate(batch.lengths):
            alone = generate(model, Batch(batch.row(row), None, (length,)))
            assert torch.equal(alone[0][0], tokens[row])
            assert (alone[1][0] - logits[row]).abs().max() <= EXACT
    visible = {index: visible_columns(entries, LONG, batch.lengths) for index, entries in kept.items()}
    with masked(model, visible):
        oracle_tokens, oracle_logits = generate(model, batch)
    assert torch.equal(tokens, oracle_tokens) and (logits - oracle_logits).abs().max() <= EXACT


@every_shape
@every_division
@every_kind
def test_bytes_are_those_of_the_formula(family: str, division: str, shape: str) -> None:
    model, batch, config = tiny_model(family), make_batch(shape, long=True), small(division)
    with llm_accel.apply(model, config) as handle:
        cache = handle.new_cache()
        generate(model, batch, past_key_values=cache)
        acting = [layer for layer in handle.report().layers if layer.skipped_reason is None]
    kept = torch.zeros(len(batch.lengths), dtype=torch.long)
    for report in acting:
        layer: Any = cache.layers[report.layer]
        entry = (layer.keys.shape[-1] + layer.values.shape[-1]) * layer.keys.element_size()
        held = layer.keys.untyped_storage().nbytes() + layer.values.untyped_storage().nbytes()
        if isinstance(layer, RaggedLayer) and layer.table is not None:
            after_prompt = layer.lengths() - (NEW - 1)
            slots = pages_held(after_prompt, config.page, NEW - 1) * config.page
            kept += after_prompt.sum(-1)
        else:
            start = torch.zeros(layer.rows, dtype=torch.long) if layer.start is None else layer.start
            slots = layer.rows * layer.kv_heads * layer.physical_length()
            kept += (layer.physical_length() - (NEW - 1) - start) * layer.kv_heads
        assert held == report.kv_bytes == slots * entry
    heads = sum(cache.layers[report.layer].kv_heads for report in acting)
    assert kept.tolist() == [heads * config.entries(length) for length in batch.lengths]


@every_kind
def test_the_laws_of_every_method_hold_across_layers(family: str) -> None:
    model = tiny_model(family)
    for shape in ("single", "padded"):
        batch = make_batch(shape, long=True)
        check_nothing_to_cut(model, batch, small(budget=None, ratio=1.0))
        check_nothing_to_cut(model, make_batch(shape, long=False), small())
        check_no_memory(model, shape, small())
        check_undo(family, batch, small())


@every_shape
@every_kind
def test_chunks_beams_and_turns(family: str, shape: str) -> None:
    model, batch = tiny_model(family), make_batch(shape, long=True)
    beams: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False}
    with llm_accel.apply(model, small(), trace=True) as handle:
        whole = generate(model, batch)
        kept = {layer.layer: layer.kept for layer in handle.report().layers if layer.kept is not None}
        chunked = generate(model, batch, prefill_chunk_size=7)
        assert torch.equal(whole[0], chunked[0]) and (whole[1] - chunked[1]).abs().max() <= EXACT
        searched = model.generate(batch.ids, attention_mask=batch.mask, **beams)
        turns = two_turns(model, batch, handle.new_cache(), full_ids=True)
    with masked(model, {index: visible_columns(k, LONG, batch.lengths) for index, k in kept.items()}):
        for one, other in zip(
            turns, two_turns(model, batch, DynamicCache(config=model.config), full_ids=True), strict=True
        ):
            assert (one - other).abs().max() <= EXACT
    lengths = tuple(length for length in batch.lengths for _ in range(3))
    visible = {index: visible_columns(k.repeat_interleave(3, 0), LONG, lengths) for index, k in kept.items()}
    with masked(model, visible):
        assert torch.equal(searched, model.generate(batch.ids, attention_mask=batch.mask, **beams))


@torch.no_grad()
@pytest.mark.parametrize(
    "build",
    [
        lambda: tiny_model("gemma2"),
        *((lambda family=family: text_model(family)) for family in ("qwen3_next", "falcon_h1", "nemotron_h", "zamba")),
    ],
)
def test_nothing_of_the_second_reading_stays(build: Callable[[], PreTrainedModel]) -> None:
    """What is kept is what the stock model holds, to the bit, and windows and states are untouched."""
    model, ids = build(), prompt(40, batch=2)
    dense = DynamicCache(config=model.config.get_text_config())
    expected = model(ids, past_key_values=dense).logits
    with llm_accel.apply(model, small(budget=16), trace=True) as handle:
        cache = handle.new_cache()
        assert torch.equal(model(ids, past_key_values=cache).logits, expected)
        for layer, stock, report in zip(cache.layers, dense.layers, handle.report().layers, strict=True):
            assert {n: t.tolist() for n, t in states_of(layer).items()} == {
                n: t.tolist() for n, t in states_of(stock).items()
            }
            if not isinstance(layer, AccelLayer):
                if getattr(stock, "keys", None) is not None:
                    assert torch.equal(layer.keys, stock.keys) and torch.equal(layer.values, stock.values)
                continue
            if report.kept is None:
                continue
            assert layer.get_seq_length() == 40
            for row, head in ((0, 0), (1, report.kept.shape[1] - 1)):
                places = report.kept[row, head]
                keys = layer.all_keys(layer.keys)[row, head, -len(places) :]
                assert torch.equal(keys[places >= 0], stock.keys[row, head, places[places >= 0]])


def test_the_context_is_read_twice_and_later_turns_once() -> None:
    model, ids = tiny_model("llama"), prompt(LONG)
    decoder, calls = model.get_decoder(), []
    forward = decoder.forward
    with torch.no_grad(), llm_accel.apply(model, small()) as handle:
        decoder.forward = lambda **kwargs: (calls.append(kwargs["input_ids"].shape[1]), forward(**kwargs))[1]
        cache = handle.new_cache()
        model(ids, past_key_values=cache)
        assert calls == [LONG, 30, 30 + LEAD, 12 + LEAD]
        model(ids[:, :9], past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
        assert calls[4:] == [9, 1]
        calls.clear()
        model(ids[:, :20], past_key_values=handle.new_cache())
        assert calls == [20]


@torch.no_grad()
def test_a_context_within_the_budget_is_never_compressed() -> None:
    model, ids = tiny_model("llama"), prompt(LONG)
    dense = DynamicCache(config=model.config)
    with llm_accel.apply(model, small()) as handle:
        cache = handle.new_cache()
        for part in (ids[:, :20], ids[:, 20:]):
            ours = model(part, past_key_values=cache).logits
        assert not any(layer.evicted for layer in handle.report().layers)
    for part in (ids[:, :20], ids[:, 20:]):
        expected = model(part, past_key_values=dense).logits
    assert (ours - expected).abs().max() <= EXACT


@torch.no_grad()
def test_a_failure_in_the_second_reading_spoils_this_cache_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model("llama"), prompt(LONG)
    with llm_accel.apply(model, small()) as handle:
        expected, cache = model(ids).logits, handle.new_cache()
        with monkeypatch.context() as patched:
            patched.setattr(KVzip, "pass_score", lambda self, view: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(ids, past_key_values=cache)
        with pytest.raises(UnsupportedCallError, match="start with a new cache"):
            model(ids[:, :1], past_key_values=cache)
        cache.reset()
        assert torch.equal(model(ids, past_key_values=cache).logits, expected)
        assert any(layer.evicted for layer in handle.report().layers)


def test_what_cannot_be_told_again_is_refused() -> None:
    with pytest.raises(UnsupportedCallError, match="token_type_ids tells the decoder something about each token"):
        Context().add(prompt(5), {"token_type_ids": prompt(5)})
    with pytest.raises(llm_accel.ConfigError, match="lets the model read the context a second time"):
        llm_accel.apply(tiny_model("llama"), ["kvzip", "hip"])


@torch.no_grad()
@every_division
def test_two_questions_on_one_stored_context(division: str, tmp_path: Path) -> None:
    """The bundled model answers both from a cache that was compressed before either was known, saved and loaded."""
    model, tokenizer = load_needle_model()
    encoder, rng = Encoder(tokenizer), random.Random(4)
    keys = grammar.make_keys(rng, 2)
    values = [grammar.make_value(rng) for _ in keys]
    stream = grammar.filler_sentences(rng)
    sentences = [next(stream) for _ in range(60)]
    for place, key, value in zip((12, 41), keys, values, strict=True):
        sentences.insert(place, grammar.needle_text(key, value))
    context = torch.tensor([[*encoder.start(""), *(i for s in sentences for i in encoder.continuation(s))]])
    with llm_accel.apply(model, "kvzip", ratio=0.25, division=division) as handle:
        handle.save_cache(handle.compress(context), tmp_path / "context.safetensors")
        stored = handle.load_cache(tmp_path / "context.safetensors")
        for key, value in zip(keys, values, strict=True):
            question = encoder.continuation(grammar.question_text([key]))
            question = [*question, *encoder.answer_prefix(grammar.answer_prefix([key]), begins=False)]
            ids = torch.cat([context, torch.tensor([question])], dim=1)
            output = model.generate(ids, past_key_values=copy.deepcopy(stored), max_new_tokens=12, do_sample=False)
            assert grammar.exact_match(encoder.decode(output[0, ids.shape[1] :].tolist()), [value])
        report = handle.report()
    assert report.kv_bytes < 0.45 * report.dense_kv_bytes


@torch.no_grad()
def test_compress_reads_a_context_as_generate_does() -> None:
    model, batch = tiny_model("llama"), make_batch("padded", long=True)
    with llm_accel.apply(model, small()) as handle:
        cache, plain = handle.compress(batch.ids, batch.mask), handle.new_cache()
        model.generate(batch.ids, attention_mask=batch.mask, past_key_values=plain, max_new_tokens=1)
        listed = handle.compress([batch.row(row)[0] for row in range(3)])
        for other in (plain, listed):
            for one, two in zip(cache.layers, other.layers, strict=True):
                assert torch.equal(one.keys, two.keys) and torch.equal(one.start, two.start)
        with pytest.raises(llm_accel.ConfigError, match="compress: give token ids"):
            handle.compress([])
        with handle.disabled(), pytest.raises(UnsupportedCallError, match="compress inside disabled"):
            handle.compress(batch.ids)
    for method in ("hip", "snapkv:compress=deferred", "h2o:semantics=sim"):
        config = llm_accel.registry.parse(method)
        refused = pytest.raises(UnsupportedCallError, match="cannot compress a context by itself")
        with llm_accel.apply(model, config) as handle, refused:
            handle.compress(batch.ids)
