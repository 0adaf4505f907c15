"""The ragged store: what it holds, what it frees, what stays where it is, against a list of entries per head."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import llm_accel
from llm_accel import AdaKV, EvictionError, UnsupportedCallError
from llm_accel.cache import RaggedLayer
from llm_accel.cache.layer import CallStage
from llm_accel.methods import WHOLE
from tests.contracts.matrix import pages_held
from tests.patches.calls import IDS, MASK
from tests.tiny import prompt, tiny_model

PAGE, DIM, WIDTH = 4, 6, 5
Rows = list[list[list[int]]]
KEPT: Rows = [[[0, 3, 9], [1, 2, 5, 7, 8, 9, 10, 11, 12]], [[4, 5, 6, 7, 8, 9, 10, 11], [12]]]


def filled(count: int = 13, batch: int = 2, heads: int = 2, start: Tensor | None = None) -> RaggedLayer:
    """A layer with random entries, seen by attention; the first feature of a key counts its slots."""
    layer = RaggedLayer(PAGE, WHOLE)
    layer.stage = CallStage.AWAITED
    layer.update(*new(count, batch, heads))
    layer.keys[..., 0] = torch.arange(count).float()
    layer.stage, layer.start = CallStage.IDLE, start
    return layer


def new(count: int, batch: int = 2, heads: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    key = torch.randn(batch, heads, count, DIM, generator=generator)
    return key, torch.randn(batch, heads, count, WIDTH, generator=generator)


def indices(rows: Rows) -> Tensor:
    """Slots per row and head, -1 first where a head keeps fewer than the longest."""
    longest = max(len(head) for row in rows for head in row)
    return torch.tensor([[[-1] * (longest - len(head)) + head for head in row] for row in rows])


def append(layer: RaggedLayer, count: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    given = new(count, layer.table.shape[0], layer.kv_heads, seed)
    layer.stage = CallStage.AWAITED
    layer.update(*given)
    layer.stage = CallStage.IDLE
    return given


def stored(layer: RaggedLayer) -> list[list[tuple[Tensor, Tensor]]]:
    """Keys and values of each row and head, read through the page table."""
    lengths = layer.lengths()
    return [
        [
            tuple(pool[layer.table[row, head].clamp(min=0)].flatten(0, 1)[: lengths[row, head]] for pool in pools)
            for head in range(lengths.shape[1])
        ]
        for row in range(lengths.shape[0])
        for pools in [(layer.keys, layer.values)]
    ]


def check(layer: RaggedLayer, expected: list[list[tuple[Tensor, Tensor]]]) -> None:
    for ours, wanted in zip(stored(layer), expected, strict=True):
        for (key, value), (one, other) in zip(ours, wanted, strict=True):
            assert torch.equal(key, one) and torch.equal(value, other)
    owned = layer.table[layer.table >= 0]
    assert owned.unique().numel() == owned.numel() == layer.used
    assert int(owned.max()) == layer.used - 1 < layer.keys.shape[0] == layer.values.shape[0]


def picked(keys: Tensor, values: Tensor, rows: Rows) -> list[list[tuple[Tensor, Tensor]]]:
    return [
        [(keys[row, head, slots], values[row, head, slots]) for head, slots in enumerate(heads)]
        for row, heads in enumerate(rows)
    ]


def longer(held: list[list[tuple[Tensor, Tensor]]], more: tuple[Tensor, Tensor]) -> list[list[tuple[Tensor, Tensor]]]:
    return [
        [(torch.cat([key, more[0][row, head]]), torch.cat([value, more[1][row, head]])) for head, (key, value) in heads]
        for row, heads in ((row, list(enumerate(heads))) for row, heads in enumerate(held))
    ]


def test_it_holds_exactly_the_pages_that_the_entries_fill() -> None:
    layer = filled()
    keys, values = layer.keys, layer.values
    layer.keep(indices(KEPT), trace=False)
    check(layer, picked(keys, values, KEPT))
    assert layer.lengths().tolist() == [[3, 9], [8, 1]]
    assert (layer.physical_length(), layer.mean_length(), layer.kv_heads) == (9, 6, 2)
    pages = 1 + 3 + 2 + 1
    assert layer.nbytes() == pages * PAGE * (DIM + WIDTH) * 4
    assert layer.keys.untyped_storage().nbytes() == pages * PAGE * DIM * 4
    assert layer.token_bytes() == 2 * 2 * (DIM + WIDTH) * 4


def test_a_token_goes_to_its_place_without_moving_the_others() -> None:
    layer = filled()
    layer.keep(indices(KEPT), trace=False)
    kept, expected, moves = layer.lengths(), stored(layer), 0
    for step in range(1, 3 * PAGE + 1):
        before = (layer.keys.data_ptr(), layer.values.data_ptr())
        pages = layer.keys.shape[0]
        layer.stage = CallStage.AWAITED
        key, _ = layer.update(*(more := new(1, seed=step)))
        layer.stage = CallStage.IDLE
        expected = longer(expected, more)
        assert key is more[0]
        check(layer, expected)
        assert layer.keys.shape[0] == pages_held(kept, PAGE, step)
        assert (layer.keys.shape[0] == pages) == (before == (layer.keys.data_ptr(), layer.values.data_ptr()))
        moves += layer.keys.shape[0] != pages
    assert moves == 3  # once a page of tokens, not once a token
    assert layer.get_seq_length() == 13 + 3 * PAGE


def test_several_tokens_take_the_pages_they_need() -> None:
    layer = filled()
    layer.keep(indices(KEPT), trace=False)
    expected = stored(layer)
    for count in (7, 1, 21, 2):
        expected = longer(expected, append(layer, count, seed=count))
        check(layer, expected)


def test_the_next_compaction_frees_what_it_evicts() -> None:
    layer = filled()
    layer.keep(indices(KEPT), trace=True)
    append(layer, 20)
    keys, values = layer.all_keys(layer.keys), stored(layer)
    assert keys.shape == (2, 2, 29, DIM)
    start = layer.start
    again: Rows = [[[27, 28], [0, 9, 28]], [[1, 28], [20, 21, 22, 23, 28]]]
    again = [[[s for s in head if s >= start[r, h]] for h, head in enumerate(row)] for r, row in enumerate(again)]
    layer.keep(indices(again), trace=True)
    wanted = [
        [
            (keys[row, head, slots], values[row][head][1][[slot - int(start[row, head]) for slot in slots]])
            for head, slots in enumerate(heads)
        ]
        for row, heads in enumerate(again)
    ]
    check(layer, wanted)
    filled_pages = sum(-(-len(head) // PAGE) for row in again for head in row)
    assert layer.nbytes() == filled_pages * PAGE * (DIM + WIDTH) * 4
    # the entry that was kept first is the prompt's own, the last one the 20th after 13
    assert layer.kept[0, 1, -1] == 12 + 20
    assert layer.kept[0, 1][layer.kept[0, 1] >= 0].tolist()[0] == KEPT[0][1][0]


def test_crop_takes_back_new_tokens_only() -> None:
    layer = filled()
    layer.keep(indices(KEPT), trace=True)
    before = stored(layer)
    append(layer, 6)
    layer.crop(-6)
    check(layer, before)
    assert layer.get_seq_length() == 13 and layer.positions.shape[-1] == 9
    check(layer, longer(before, append(layer, 3)))
    with pytest.raises(UnsupportedCallError, match="at most 3"):
        layer.crop(-4)


MOVES: dict[str, tuple[Callable[[RaggedLayer], None], list[int]]] = {
    "reordered": (lambda layer: layer.reorder_cache(torch.tensor([1, 1])), [1, 1]),
    "repeated": (lambda layer: layer.batch_repeat_interleave(3), [0, 0, 0, 1, 1, 1]),
    "selected": (lambda layer: layer.batch_select_indices(torch.tensor([1])), [1]),
}


@pytest.mark.parametrize("move", MOVES)
def test_rows_move_with_their_pages(move: str) -> None:
    layer, (change, rows) = filled(), MOVES[move]
    layer.keep(indices(KEPT), trace=True)
    append(layer, 2)
    moved, held, kept = copy.deepcopy(layer), stored(layer), layer.kept
    change(moved)
    check(moved, [held[row] for row in rows])
    assert torch.equal(moved.kept, kept[rows])
    more = append(moved, 5)
    check(moved, longer([held[row] for row in rows], more))
    check(layer, held)  # the copy shares nothing with it


def test_reset_starts_over() -> None:
    layer = filled()
    layer.keep(indices(KEPT), trace=False)
    layer.reset()
    assert layer.table is None and layer.get_seq_length() == layer.physical_length() == layer.nbytes() == 0
    layer.stage = CallStage.AWAITED
    assert layer.update(*new(3))[0].shape == (2, 2, 3, DIM)


def test_padding_is_never_stored() -> None:
    layer = filled(start=torch.tensor([0, 5]))
    layer.keep(indices([[[0, 1, 2], [12]], [[5, 12], [6, 7, 12]]]), trace=True)
    assert layer.lengths().tolist() == [[3, 1], [2, 3]]
    assert layer.kept.tolist() == [[[0, 1, 2], [-1, -1, 12]], [[-1, 0, 7], [1, 2, 7]]]


def test_a_single_head_stays_dense() -> None:
    layer = filled(heads=1)
    layer.keep(indices([[[1, 2, 12]], [[0, 5, 12]]]), trace=False)
    assert layer.table is None and layer.keys.shape == (2, 1, 3, DIM)
    layer.stage = CallStage.AWAITED
    assert layer.update(*new(1, heads=1))[0].shape == (2, 1, 4, DIM)


# --- in a model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [1, 8, 64])
def test_pages_of_any_size_give_the_same_tokens(model: PreTrainedModel, page: int) -> None:
    results = []
    for size in (page, 16):
        with llm_accel.apply(model, AdaKV(budget=24, window=8, page=size)) as handle:
            tokens = model.generate(IDS, attention_mask=MASK, max_new_tokens=40, do_sample=False)
            results.append((tokens, [layer.evicted for layer in handle.report().layers]))
    assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]


def test_fewer_bytes_than_padding_heads_to_the_longest(model: PreTrainedModel) -> None:
    ids = prompt(400)
    with llm_accel.apply(model, AdaKV(budget=120, window=8, page=8, kernel=7)) as handle:
        model.generate(ids, max_new_tokens=2, do_sample=False)
        layers = handle.report().layers
    for layer in layers:
        entry = layer.dense_kv_bytes // layer.logical_length
        assert layer.kv_bytes < entry * layer.physical_length
        assert layer.kv_bytes <= entry * (120 + 1 + 2 * 8)


def test_the_report_counts_pages_and_names_the_backend(model: PreTrainedModel) -> None:
    with llm_accel.apply(model, AdaKV(budget=24, window=8, page=8)) as handle:
        cache = handle.new_cache()
        model(IDS[:1], past_key_values=cache)
        report = handle.report()
    assert report.backends["decode"][0] == "torch"
    for layer, held in zip(report.layers, cache.layers, strict=True):
        assert layer.kv_bytes == held.keys.untyped_storage().nbytes() + held.values.untyped_storage().nbytes()
        assert layer.evicted == IDS.shape[1] - 24
        assert layer.physical_length == held.lengths().max()


def test_an_eviction_that_never_comes_is_found(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RaggedLayer, "keep", lambda *_: None)
    with llm_accel.apply(model, AdaKV(budget=24, window=8)), pytest.raises(EvictionError, match="layer 0"):
        model(IDS)


def test_layers_that_are_skipped_count_neither_as_layers_nor_as_pages() -> None:
    model, ids = tiny_model("llama"), prompt(72)
    config = AdaKV(budget=24, window=8, base="pyramidkv", beta=4, skip_layers=(1,))
    with llm_accel.apply(model, config) as handle:
        cache = handle.new_cache()
        model(ids, past_key_values=cache)
        evicted = [layer.evicted for layer in handle.report().layers]
    assert evicted == [72 - 8 - 28, 0, 72 - 8 - 4]
    assert [type(layer) is RaggedLayer for layer in cache.layers] == [True, False, True]
