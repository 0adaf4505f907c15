"""AdaKV with one budget for the whole model: what all heads of all layers keep, against an oracle in plain python."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import llm_accel
from llm_accel import AdaKV, ConfigError
from llm_accel.methods import PromptView
from tests.tiny import tiny_model

LAYERS, HEADS, SLOTS, WINDOW = 3, 2, 30, 4
MODEL = "adakv:budget=16,window=4,page=4,across=model"


def views_of(lengths: tuple[int, ...]) -> list[PromptView]:
    generator = torch.Generator().manual_seed(len(lengths))
    start = torch.tensor([SLOTS - length for length in lengths])
    return [
        PromptView(
            torch.randn(len(lengths), 2 * HEADS, WINDOW, 8, generator=generator) * (1 + layer),
            torch.randn(len(lengths), HEADS, SLOTS, 8, generator=generator),
            start=start if bool(start.any()) else None,
            scaling=0.5,
            softcap=None,
            sinks=None,
            kv_heads=HEADS,
            layer=layer,
            layers=LAYERS,
        )
        for layer in range(LAYERS)
    ]


def expected(config: AdaKV, orders: list[Tensor], row: int, length: int) -> set[tuple[int, int, int]]:
    """The guaranteed entries of each head, then the best of all that are left."""
    worth = {
        (layer, head, slot): int(orders[layer][row, head, slot])
        for layer in range(LAYERS)
        for head in range(HEADS)
        for slot in range(SLOTS - length, SLOTS)
    }
    budget = config.entries(length)
    sure = config.reserved + max(int((budget - config.reserved) * config.alpha), int(config.alpha > 0))
    ranked = sorted(worth, key=lambda entry: (-worth[entry], entry[2], entry[0], entry[1]))
    kept: set[tuple[int, int, int]] = set()
    for layer in range(LAYERS):
        for head in range(HEADS):
            kept |= set([entry for entry in ranked if entry[:2] == (layer, head)][:sure])
    rest = [entry for entry in ranked if entry not in kept]
    return kept | set(rest[: LAYERS * HEADS * budget - len(kept)])


@pytest.mark.parametrize("lengths", [(30,), (30, 19)])
@pytest.mark.parametrize("alpha", [0.0, 0.25])
def test_all_heads_share_one_budget(lengths: tuple[int, ...], alpha: float) -> None:
    config, views = AdaKV(ratio=0.4, window=WINDOW, alpha=alpha, kernel=1, across="model"), views_of(lengths)
    kept = config.select_all(views)
    orders = [config.order(view) for view in views]
    for row, length in enumerate(lengths):
        found = {
            (layer, head, slot)
            for layer in range(LAYERS)
            for head in range(HEADS)
            for slot in kept[layer][row, head].tolist()
            if slot >= 0
        }
        assert found == expected(config, orders, row, length)
        assert len(found) == LAYERS * HEADS * config.entries(length)


def entries(model: Any, method: str, ids: Tensor, mask: Tensor | None = None) -> list[list[set[int]]]:
    """Positions that each row keeps of its prompt, by layer and head."""
    with llm_accel.apply(model, method, trace=True) as handle:
        model.generate(ids, attention_mask=mask, max_new_tokens=1, do_sample=False)
        layers = handle.report().layers
    held: list[list[set[int]]] = [[] for _ in range(ids.shape[0])]
    for layer in layers:
        assert layer.kept is not None
        for row, heads in enumerate(layer.kept):
            held[row] += [{int(position) for position in head if position >= 0} for head in heads]
    return held


def test_a_padded_row_keeps_what_it_keeps_alone() -> None:
    model, ids = tiny_model("llama"), torch.randint(5, 100, (2, 50), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    together = entries(model, MODEL, ids, mask)
    assert together[0] == entries(model, MODEL, ids[:1])[0]
    assert together[1] == entries(model, MODEL, ids[1:, 17:])[0]
    assert len({len(head) for head in together[0]}) > 1


@pytest.mark.parametrize("chunk", [16, 49])
def test_chunks_of_a_prompt_change_nothing(chunk: int) -> None:
    model, ids = tiny_model("llama"), torch.randint(5, 100, (1, 50), generator=torch.Generator().manual_seed(3))
    answers = []
    for more in ({}, {"prefill_chunk_size": chunk}):
        with llm_accel.apply(model, MODEL):
            answers.append(model.generate(ids, max_new_tokens=8, do_sample=False, **more).tolist())
    assert answers[0] == answers[1]


def test_prompts_read_apart_are_joined() -> None:
    model, ids = tiny_model("llama"), torch.randint(5, 100, (2, 50), generator=torch.Generator().manual_seed(4))
    with llm_accel.apply(model, MODEL) as handle:
        whole = model.generate(ids, max_new_tokens=8, do_sample=False)
        cache = handle.prefill(ids)
        assert torch.equal(model.generate(**cache.inputs, max_new_tokens=8, do_sample=False), whole)


@pytest.mark.parametrize(
    "option", [{"compress": "deferred"}, {"multi_turn": "recompress"}, {"budget": 64, "recompress_every": 8}], ids=str
)
def test_it_happens_once(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="with across=model, where all layers evict at the end of the first prompt"):
        AdaKV(across="model", **option)


def test_a_base_that_divides_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="gives each layer as much with across=model, and pyramidkv does not"):
        AdaKV(across="model", base="pyramidkv")
