"""H2O's masking simulation equals a plain-python loop: everything stays stored, each head hides its part anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llm_accel
from llm_accel import H2O, ConfigError, UnsupportedCallError
from tests.contracts.laws import (
    check_copied_cache,
    check_going_past_raises,
    check_no_memory,
    check_nothing_to_cut,
    check_undo,
    searched,
)
from tests.contracts.matrix import NEW, every_family, every_shape, generate, make_batch
from tests.contracts.plain_attention import attention_output, attention_weights, running
from tests.tiny import prompt, tiny_model

EXACT = 1e-5


@dataclass
class HidingOracle:
    """Attention of a stock model that hides entries by the rule of the simulation, as sets and loops.

    Attributes:
        sizes: heavy and recent entries of each row.
        padding: leading padding of each row.
        kv_heads: heads that decide on their own; None where each key head does.
        scores: layer -> (row, head) -> attention received by each column.
        shown: layer -> (row, head) -> columns that the next token sees beside itself.
        layers: layers that the rule acts on.
    """

    sizes: list[tuple[int, int]]
    padding: tuple[int, ...]
    sinks: int = 0
    decay: float = 1.0
    norm: str = "sum"
    kv_heads: int | None = None
    layers: tuple[int, ...] = (0, 1, 2)
    scores: dict[int, dict[tuple[int, int], list[float]]] = field(default_factory=dict)
    shown: dict[int, dict[tuple[int, int], set[int]]] = field(default_factory=dict)

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        layer, columns, length = module.layer_idx, key.shape[2], query.shape[2]
        if layer not in self.layers:
            return attention_output(attention_weights(query, key, attention_mask, None, kwargs), value), None
        heads = self.kv_heads or key.shape[1]
        visible = torch.ones(query.shape[0], heads, 1, columns, dtype=torch.bool)
        for (row, head), seen in self.shown.get(layer, {}).items():
            visible[row, head, 0] = torch.tensor([c in seen or c >= columns - length for c in range(columns)])
        weights = attention_weights(query, key, attention_mask, visible, kwargs)
        votes = weights.double().view(query.shape[0], heads, -1, length, columns).sum(2)
        scores, shown = self.scores.setdefault(layer, {}), self.shown.setdefault(layer, {})
        for row, (heavy, recent) in enumerate(self.sizes):
            real = votes[row, :, self.padding[row] if length == columns else 0 :].sum(1)
            for head in range(heads):
                old = scores.get((row, head), [])
                fade = self.decay if length == 1 else 1.0
                now = [fade * s + v for s, v in zip(old + [0.0] * length, real[head].tolist(), strict=False)]
                scores[row, head] = now
                shown[row, head] = self.next_shown(now, self.padding[row], heavy, recent)
        return attention_output(weights, value), None

    def next_shown(self, scores: list[float], first: int, heavy: int, recent: int) -> set[int]:
        """Candidates are taken before the window moves on, the window after it."""
        total = len(scores)
        if total - first < heavy + recent:
            return set(range(first, total))
        candidates = range(first, total - recent)
        rank = {c: scores[c] / (total - c if self.norm == "mean" else 1) for c in candidates}
        order = sorted(candidates, key=lambda c: (c >= first + self.sinks, -rank[c], c))
        return set(order[:heavy]) | set(range(total + 1 - recent, total))


Kept = list[list[Tensor | None]]


def lockstep(model: Any, config: H2O, ids: Tensor, mask: Tensor | None, oracle: HidingOracle, steps: int) -> Kept:
    """Decodes greedily with the plug-in and with the oracle; compares logits and kept sets at each step, and returns
    what the plug-in kept at each step in each layer."""
    ours, kept, tokens = [], [], ids
    with torch.no_grad(), llm_accel.apply(model, config, trace=True) as handle:
        cache, seen = handle.new_cache(), mask
        for _ in range(steps + 1):
            ours.append(model(tokens, attention_mask=seen, past_key_values=cache).logits[:, -1:])
            tokens = ours[-1].argmax(-1)
            seen = None if seen is None else torch.nn.functional.pad(seen, (0, 1), value=1)
            kept.append([layer.kept for layer in handle.report().layers])
    with torch.no_grad(), running(model, oracle):
        cache, tokens, seen = None, ids, mask
        for logits, sets in zip(ours, kept, strict=True):
            output = model(tokens, attention_mask=seen, past_key_values=cache)
            cache, tokens = output.past_key_values, output.logits[:, -1:].argmax(-1)
            seen = None if seen is None else torch.nn.functional.pad(seen, (0, 1), value=1)
            assert (output.logits[:, -1:] - logits).abs().max() <= EXACT
            for layer in oracle.layers:
                for (row, head), expected in oracle.shown[layer].items():
                    if sets[layer] is not None:
                        held = sets[layer][row, head]
                        assert held[held >= 0].tolist() == sorted(c - oracle.padding[row] for c in expected)
    assert all(kept[-1][layer] is not None for layer in oracle.layers)
    return kept


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (H2O(heavy=8, recent=8, sinks=0, semantics="sim"), {}),
        (H2O(heavy=10, recent=1, sinks=0, semantics="sim"), {}),
        (H2O(heavy=0, recent=12, sinks=0, semantics="sim"), {}),
        (H2O(heavy=9, recent=5, sinks=3, decay=0.9, semantics="sim"), {"sinks": 3, "decay": 0.9}),
        (H2O(heavy=8, recent=8, sinks=0, norm="mean", semantics="sim"), {"norm": "mean"}),
    ],
    ids=lambda value: value.spec() if isinstance(value, H2O) else "",
)
def test_shown_sets_equal_the_oracle_at_each_of_64_steps(config: H2O, changes: dict[str, Any]) -> None:
    assert config.budget is not None and config.recent is not None
    oracle = HidingOracle([(config.budget - config.recent, config.recent)], (0,), **changes)
    kept = lockstep(tiny_model("llama"), config, prompt(40), None, oracle, 64)
    if config.norm == "sum":  # a sum only grows: what has lost to all others never returns, so eviction loses nothing
        assert not returning(kept, 40, config.recent)


def returning(kept: Kept, length: int, recent: int) -> set[int]:
    """Positions that some head sees again after they were hidden for more than the one step after the window."""
    returned = set()
    for layer in range(3):
        for head in range(2):
            dropped: set[int] = set()
            for step, sets in enumerate(kept):
                held, leaving = set(sets[layer][0, head].tolist()), length + step - recent
                returned |= held & dropped
                dropped = set(range(length + step)) - held - {leaving}
    return returned


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt_oss", "deepseek_v3"])
def test_rows_of_a_padded_batch_equal_the_oracle(family: str) -> None:
    model, batch = tiny_model(family), make_batch("padded", long=True)
    padding = tuple(max(batch.lengths) - length for length in batch.lengths)
    config = H2O(budget=24, sinks=0, semantics="sim")
    with llm_accel.apply(model, config) as handle:
        generate(model, batch)
        acting = tuple(layer.layer for layer in handle.report().layers if layer.skipped_reason is None)
    heads = 1 if family == "deepseek_v3" else None
    oracle = HidingOracle([(12, 12)] * 3, padding, kv_heads=heads, layers=acting)
    lockstep(model, config, batch.ids, batch.mask, oracle, 20)


def test_a_ratio_is_of_the_prompt_and_stays_when_the_answer_grows() -> None:
    batch = make_batch("padded", long=True)
    config = H2O(ratio=0.3, sinks=0, semantics="sim")
    sizes = [(entries - entries // 2, entries // 2) for entries in map(config.entries, batch.lengths)]
    oracle = HidingOracle(sizes, tuple(max(batch.lengths) - length for length in batch.lengths))
    lockstep(tiny_model("llama"), config, batch.ids, batch.mask, oracle, 30)


def test_short_prompts_grow_to_the_budget_and_never_see_more() -> None:
    config = H2O(heavy=12, recent=12, sinks=0, semantics="sim")
    oracle = HidingOracle([(12, 12)], (0,))
    lockstep(tiny_model("llama"), config, prompt(10), None, oracle, 40)
    assert {len(entries) for heads in oracle.shown.values() for entries in heads.values()} == {23}


@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_prompts_in_pieces_decode_the_same(chunk: int) -> None:
    model, batch = tiny_model("llama"), make_batch("padded", long=True)
    results = []
    for size in (None, chunk):
        with llm_accel.apply(model, H2O(budget=24, semantics="sim")):
            options = {"max_new_tokens": 20, "do_sample": False, "prefill_chunk_size": size}
            results.append(model.generate(batch.ids, attention_mask=batch.mask, **options))
    assert torch.equal(*results)


def test_nothing_is_freed_and_the_report_says_so() -> None:
    model, ids = tiny_model("llama"), prompt(72)
    with llm_accel.apply(model, "h2o", budget=24, semantics="sim") as handle:
        assert "frees no memory" in str(handle.report())
        model.generate(ids, max_new_tokens=6, do_sample=False)
        report = handle.report()
    assert report.kv_bytes == report.dense_kv_bytes > 0
    assert all(layer.evicted == 0 and layer.physical_length == 77 for layer in report.layers)
    assert report.warnings == ["entries are hidden from attention, none is evicted: this frees no memory"]
    with llm_accel.apply(model, "h2o", budget=24) as handle:
        model.generate(ids, max_new_tokens=6, do_sample=False)
        assert handle.report().warnings == []


@pytest.mark.parametrize("changes", [{"budget": 100}, {"ratio": 1.0}], ids=str)
def test_nothing_to_hide_changes_nothing(changes: dict[str, Any]) -> None:
    model, batch = tiny_model("llama"), make_batch("padded", long=True)
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    dense = model.generate(batch.ids, attention_mask=batch.mask, **options)
    with llm_accel.apply(model, H2O(semantics="sim", **changes)):
        ours = model.generate(batch.ids, attention_mask=batch.mask, **options)
    assert torch.equal(torch.stack(ours.logits), torch.stack(dense.logits))


def rows_swapped(cache: Any) -> None:
    cache.reorder_cache(torch.tensor([1, 0]))


def rows_doubled(cache: Any) -> None:
    cache.batch_repeat_interleave(2)


@pytest.mark.parametrize(("change", "order"), [(rows_swapped, [1, 0]), (rows_doubled, [0, 0, 1, 1])])
@pytest.mark.parametrize("budget", [{"budget": 24}, {"ratio": 0.4}], ids=str)
def test_rows_take_their_scores_and_what_they_hide_along(
    change: Callable[[Any], None], order: list[int], budget: dict[str, Any]
) -> None:
    model, ids, config = tiny_model("llama"), prompt(40, batch=2), H2O(semantics="sim", **budget)
    tokens = [prompt(1, seed=seed, batch=2) for seed in range(12)]
    logits = []
    for after in (3, 0):  # the rows change places late, or the prompt has them in that order
        with torch.no_grad(), llm_accel.apply(model, config) as handle:
            cache, rows = handle.new_cache(), order if after == 0 else [0, 1]
            model(ids[rows], past_key_values=cache)
            for step, token in enumerate(tokens):
                if after and step == after:
                    change(cache)
                    rows = order
                output = model(token[rows], past_key_values=cache).logits
        logits.append(output)
    assert (logits[0] - logits[1]).abs().max() <= EXACT


def test_a_second_turn_goes_on_hiding(tmp_path: Any) -> None:
    model, first, second = tiny_model("llama"), prompt(40), prompt(9, seed=5)
    with torch.no_grad(), llm_accel.apply(model, H2O(budget=24, sinks=0, semantics="sim"), trace=True) as handle:
        cache = handle.new_cache()
        model(first, past_key_values=cache)
        handle.save_cache(cache, tmp_path / "cache.safetensors")
        logits = []
        for one in (cache, handle.load_cache(tmp_path / "cache.safetensors")):
            model(second, past_key_values=one)
            logits.append(model(second[:, :1], past_key_values=one).logits)
            kept = handle.report().layers[0].kept
            assert kept.shape[-1] == 23
            assert kept[0, 0, -11:].tolist() == list(range(39, 50))
        with pytest.raises(UnsupportedCallError, match="cannot be cropped"):
            cache.crop(-1)
    assert torch.equal(*logits)


def test_the_new_token_is_one_of_the_recent() -> None:
    with pytest.raises(ConfigError, match="counts the new token as recent"):
        H2O(heavy=8, recent=0, sinks=0, semantics="sim")
    assert H2O.parse({"semantics": "sim"}).hides
    assert not H2O().hides


SIM = H2O(budget=24, semantics="sim")


@every_shape
@every_family
def test_the_laws_of_every_method(family: str, shape: str) -> None:
    """Nothing hidden changes nothing, undo is exact, no memory between calls; rows of a batch are independent."""
    model, batch = tiny_model(family), make_batch(shape, long=True)
    check_nothing_to_cut(model, batch, H2O(budget=batch.ids.shape[1] + NEW, semantics="sim"))
    check_nothing_to_cut(model, make_batch(shape, long=False), SIM)
    check_undo(family, batch, SIM)
    check_no_memory(model, shape, SIM)
    with llm_accel.apply(model, SIM):
        tokens, logits = generate(model, batch)
        for index, length in enumerate(batch.lengths):
            alone = generate(model, type(batch)(batch.row(index), None, (length,)))
            assert torch.equal(alone[0][0], tokens[index])
            assert (alone[1][0] - logits[index]).abs().max() <= EXACT


def test_a_layer_that_loses_its_session_is_found() -> None:
    check_going_past_raises(SIM)


def test_a_copied_cache_is_reusable_for_another_question() -> None:
    check_copied_cache(SIM)


@pytest.mark.parametrize("mode", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}], ids=str)
def test_search_modes_with_nothing_to_hide_equal_dense(mode: dict[str, Any]) -> None:
    model, batch = tiny_model("llama"), make_batch("padded", long=True)
    dense = searched(model, batch, mode)
    with llm_accel.apply(model, H2O(ratio=1.0, semantics="sim")):
        assert torch.equal(searched(model, batch, mode), dense)
