"""Compression while decoding: a hard cap, the right choice at each cut, and decoding that hides what was evicted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import llm_accel
from llm_accel import AdaKV, ConfigError, PyramidKV, RandomKV, SnapKV, UnsupportedCallError
from llm_accel.methods import Depth, PromptCompression, PromptView
from tests.contracts.matrix import (
    BUDGET,
    LONG,
    METHODS,
    acting,
    every_method_that_cuts_again,
    every_shape,
    generate,
    make_batch,
)
from tests.contracts.oracle import MaskedOracle
from tests.contracts.plain_attention import running
from tests.tiny import prompt, tiny_model

EVERY, STEPS, WINDOW = 16, 60, 8


@every_shape
@every_method_that_cuts_again
def test_200_steps_never_exceed_the_cap(method: str, shape: str) -> None:
    model, batch, config = tiny_model("llama"), make_batch(shape, long=True), METHODS[method](recompress_every=EVERY)
    mask = torch.ones_like(batch.ids) if batch.mask is None else batch.mask
    cuts: dict[int, int] = {}
    with torch.no_grad(), llm_accel.apply(model, config, trace=True) as handle:
        cache, step = handle.new_cache(), batch.ids
        before, held = {}, set()
        for index in range(201):
            step = model(step, attention_mask=mask, past_key_values=cache).logits[:, -1:].argmax(-1)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            for layer, depth in acting(handle.report()):
                stored = layer.logical_length - layer.evicted
                cap = config.layer_entries(10**6, replace(depth, later=True))
                assert stored < cap + EVERY
                if index > 1 and stored < before[layer.layer]:
                    assert before[layer.layer] == cap + EVERY - 1
                    # a short row fills up later than the others and is cut when it is full itself
                    assert stored == cap or (shape == "padded" and stored > cap)
                    cuts[layer.layer] = cuts.get(layer.layer, 0) + 1
                before[layer.layer] = stored
            held.add(handle.report().kv_bytes)
    assert cuts and all(count >= 10 for count in cuts.values())
    assert max(held) < handle.report().dense_kv_bytes / 3


class Recorder(MaskedOracle):
    """The dense oracle, which also remembers the last queries and all keys of each layer."""

    def __init__(self) -> None:
        super().__init__({})
        self.queries: dict[int, Tensor] = {}
        self.keys: dict[int, Tensor] = {}
        self.scaling = 1.0

    def __call__(self, module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        seen = self.queries.get(module.layer_idx, query[:, :, :0])
        self.queries[module.layer_idx] = torch.cat([seen, query], 2)[:, :, -WINDOW:]
        self.keys[module.layer_idx] = key
        self.scaling = kwargs["scaling"]
        return super().__call__(module, query, key, *args, **kwargs)

    def view(self, layer: int, visible: Tensor, depth: Depth) -> tuple[PromptView, Tensor]:
        """What a method sees of the ``visible`` columns, bool [1, Hk, n], and their columns, right-aligned."""
        counts = visible.sum(-1)
        slots = int(counts.max())
        columns = torch.where(visible, torch.arange(visible.shape[-1]), -1).sort(-1).values[..., -slots:]
        key = self.keys[layer].gather(2, columns.clamp(min=0)[..., None].expand(-1, -1, -1, self.keys[layer].shape[-1]))
        start = slots - counts if bool((counts != slots).any()) else None
        view = PromptView(
            self.queries[layer], key, visible.shape[1], start=start, scaling=self.scaling, layer=layer, layers=3
        )
        return replace(view, depth=depth, slack=EVERY), columns


CONFIGS: list[PromptCompression] = [
    SnapKV(budget=BUDGET, window=WINDOW, recompress_every=EVERY),
    PyramidKV(budget=BUDGET, window=WINDOW, beta=2, recompress_every=EVERY),
    AdaKV(budget=BUDGET, window=WINDOW, page=8, recompress_every=EVERY),
    AdaKV(budget=BUDGET, window=WINDOW, page=8, rule="blend", recompress_every=EVERY, compress="deferred"),
    RandomKV(budget=BUDGET, window=WINDOW, recompress_every=EVERY),
]


@torch.no_grad()
@pytest.mark.parametrize("length", [LONG, 12])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.spec())
def test_each_cut_is_the_methods_choice_and_hides_the_rest(config: PromptCompression, length: int) -> None:
    model, stock, ids = tiny_model("llama"), tiny_model("llama"), prompt(length)
    tokens, recorder, checked = prompt(STEPS, seed=9), Recorder(), 0
    with llm_accel.apply(model, config, trace=True) as handle, running(stock, recorder):
        cache, dense, seen = handle.new_cache(), None, 0
        visible = {layer: torch.ones(1, 2, 0, dtype=torch.bool) for layer in range(3)}
        for step in [ids, *tokens.split(1, dim=1)]:
            before = {layer: cache.layers[layer].kept for layer in range(3)}
            ours = model(step, past_key_values=cache).logits
            if config.deferred and seen == length:  # the prompt was cut before this step was attended to
                recorder.visible = {
                    layer: shown(cache.layers[layer].kept[..., :-1], seen)
                    for layer in range(3)
                    if cache.layers[layer].kept is not None
                }
            output = stock(step, past_key_values=dense)
            dense = output.past_key_values
            assert (ours[:, -1] - output.logits[:, -1]).abs().max() <= 1e-5
            seen += step.shape[1]
            for layer in range(3):
                visible[layer] = torch.nn.functional.pad(visible[layer], (0, step.shape[1]), value=True)
                kept = cache.layers[layer].kept
                if kept is None or kept is before[layer]:
                    continue
                now = shown(kept, seen)
                if seen > length + 1:
                    view, columns = recorder.view(layer, visible[layer], Depth(layer, 3, later=True))
                    chosen = config.select(view)
                    if not isinstance(config, RandomKV):
                        assert torch.equal(columns.gather(2, chosen.clamp(min=0)).masked_fill(chosen < 0, -1), kept)
                    checked += 1
                visible[layer] = recorder.visible[layer] = now
    assert checked >= 6


def shown(kept: Tensor, seen: int) -> Tensor:
    """bool [1, Hk, seen] from kept positions."""
    mask = torch.zeros(*kept.shape[:2], seen + 1, dtype=torch.bool)
    return mask.scatter(2, kept.masked_fill(kept < 0, seen), True)[..., :seen]


@pytest.mark.parametrize("method", ["snapkv", "pyramidkv", "adakv"])
def test_rows_are_cut_when_they_are_full_themselves(method: str) -> None:
    model, batch = tiny_model("llama"), make_batch("padded", long=True)
    # the model's answer repeats one token, whose votes are equal but for rounding: a wider pooling would choose by that
    with llm_accel.apply(model, METHODS[method](recompress_every=EVERY, kernel=7)):
        tokens, logits = generate(model, batch, max_new_tokens=70)
        for index, length in enumerate(batch.lengths):
            row = type(batch)(batch.row(index), None, (length,))
            alone, alone_logits = generate(model, row, max_new_tokens=70)
            assert torch.equal(tokens[index], alone[0])
            assert (logits[index] - alone_logits[0]).abs().max() <= 1e-4


@pytest.mark.parametrize("method", ["snapkv", "adakv"])
def test_deferred_and_chunked_decode_the_same(method: str) -> None:
    model, batch = tiny_model("llama"), make_batch("padded", long=True)
    results = []
    for when, chunk in (("eager", None), ("eager", 7), ("deferred", None), ("deferred", 10)):
        with llm_accel.apply(model, METHODS[method](recompress_every=EVERY, compress=when)):
            results.append(generate(model, batch, max_new_tokens=40, prefill_chunk_size=chunk)[0])
    assert all(torch.equal(tokens, results[0]) for tokens in results)


def test_a_cap_needs_an_absolute_budget_and_no_protection() -> None:
    with pytest.raises(ConfigError, match=r"give budget instead of ratio=0\.5"):
        SnapKV(ratio=0.5, recompress_every=16)
    with pytest.raises(ConfigError, match="recompress_every=0 is not allowed"):
        AdaKV(recompress_every=0)
    model, ids = tiny_model("llama"), prompt(40)
    with llm_accel.apply(model, SnapKV(budget=24, window=8, recompress_every=4)):
        with pytest.raises(UnsupportedCallError, match="leave one of them out"):
            model.generate(ids, protect_mask=torch.ones_like(ids), max_new_tokens=2)
        model.generate(ids, max_new_tokens=2)
