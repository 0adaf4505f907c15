"""The cache: reset, crop, rows that are reordered, caches that users bring, and every way to hand a mask over."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from llm_accel import UnsupportedCallError
from llm_accel.patches.cache_name import CACHE
from tests.patches.calls import BUDGET, IDS, MASK, NEW, failing_once, logits_of, snapkv
from tests.tiny import prompt, tiny_model


@pytest.mark.parametrize("compress", ["eager", "deferred"])
def test_a_reset_cache_starts_over(model: PreTrainedModel, compress: str) -> None:
    handle, short = snapkv(model, compress=compress), prompt(40)
    expected, cache = logits_of(model, short, None), handle.new_cache()
    logits_of(model, past_key_values=cache)
    cache.reset()
    assert torch.equal(logits_of(model, short, None, past_key_values=cache), expected)
    cache.reset()
    model(short[:, :30], past_key_values=cache)
    model(short[:, :1], past_key_values=cache)
    assert [layer.physical_length() for layer in cache.layers] == [BUDGET + 1] * 3


@pytest.mark.parametrize("part", ["input_layernorm", "self_attn", "mlp"])
def test_a_cache_of_a_failed_call_is_not_continued(model: PreTrainedModel, part: str) -> None:
    cache = snapkv(model).new_cache()
    with failing_once(getattr(model.model.layers[1], part)):
        model(IDS, past_key_values=cache)
    with pytest.raises(UnsupportedCallError, match="half-way; start with a new cache"):
        model(IDS[:, :1], past_key_values=cache)
    cache.reset()
    model(IDS, past_key_values=cache)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma2", "gpt_oss"])
def test_a_cache_without_layers_is_filled_in_for_the_model(family: str) -> None:
    model = tiny_model(family)
    dense, real = logits_of(model), MASK.bool()
    forward = model(IDS, attention_mask=MASK).logits[real]
    with snapkv(model, budget=1000):
        assert torch.equal(logits_of(model, past_key_values=DynamicCache()), dense)
        assert torch.equal(model(IDS, attention_mask=MASK, past_key_values=DynamicCache()).logits[real], forward)
    with snapkv(model):
        assert torch.equal(logits_of(model, past_key_values=DynamicCache()), logits_of(model))


def test_a_cache_comes_under_each_of_its_names(model: PreTrainedModel) -> None:
    handle = snapkv(model)
    expected, forward = logits_of(model), model(IDS, attention_mask=MASK, use_cache=True)
    for name in {CACHE, "past_key_values"}:
        generated, called, inner = (handle.new_cache() for _ in range(3))
        assert torch.equal(logits_of(model, **{name: generated}), expected)
        output = model(IDS, attention_mask=MASK, **{name: called})
        assert torch.equal(output.logits, forward.logits)
        assert output[name] is called
        model.model(IDS, attention_mask=MASK, **{name: inner})
        for cache in (called, inner):
            assert [layer.physical_length() for layer in cache.layers] == [BUDGET] * 3
        assert generated.layers[0].physical_length() == BUDGET + NEW - 1


def test_arguments_by_position(model: PreTrainedModel) -> None:
    real = MASK.bool()
    dense = model.model(IDS, MASK).last_hidden_state[real]
    handle = snapkv(model)
    cache = handle.new_cache()
    assert torch.equal(model.model(IDS, MASK).last_hidden_state[real], dense)
    assert torch.equal(model.model(IDS, MASK, None, cache).last_hidden_state[real], dense)
    assert cache.layers[0].physical_length() == BUDGET
    with handle.disabled():
        assert torch.equal(model.model(IDS, MASK).last_hidden_state[real], dense)


def test_without_a_cache_everything_is_dense(model: PreTrainedModel) -> None:
    dense, hidden = logits_of(model, use_cache=False), model(IDS, attention_mask=MASK, use_cache=False).logits
    snapkv(model)
    assert torch.equal(logits_of(model, use_cache=False), dense)
    assert torch.equal(model(IDS, attention_mask=MASK, use_cache=False).logits, hidden)


def test_packed_sequences_are_what_they_are_without_the_plugin(model: PreTrainedModel) -> None:
    positions = torch.cat([torch.arange(30), torch.arange(30)])[None]
    dense = [model(IDS[:1], position_ids=positions, use_cache=cached).logits for cached in (True, False)]
    snapkv(model)
    ours = [model(IDS[:1], position_ids=positions, use_cache=cached).logits for cached in (True, False)]
    assert all(torch.equal(one, other) for one, other in zip(ours, dense, strict=True))


def test_deferred_with_a_prompt_of_exactly_the_budget(model: PreTrainedModel) -> None:
    ids = prompt(BUDGET)
    dense = logits_of(model, ids, None)
    handle = snapkv(model, compress="deferred")
    assert torch.equal(logits_of(model, ids, None), dense)
    assert handle.report().layers[0].evicted == 0
    logits_of(model, prompt(BUDGET + 1), None)
    assert handle.report().layers[0].evicted == 1


def test_crop_takes_back_new_tokens_only(model: PreTrainedModel) -> None:
    handle = snapkv(model, trace=True)
    cache = handle.new_cache()
    model(IDS, attention_mask=MASK, past_key_values=cache)
    question = prompt(5, batch=2)
    expected = model(question, past_key_values=copy.deepcopy(cache)).logits
    model(prompt(7, seed=8, batch=2), past_key_values=cache)
    cache.crop(-7)
    assert cache.get_seq_length() == IDS.shape[1]
    assert cache.layers[0].physical_length() == BUDGET
    assert torch.equal(model(question, past_key_values=cache).logits, expected)
    assert cache.layers[0].positions.shape[-1] == BUDGET + 5
    with pytest.raises(UnsupportedCallError, match="at most 5"):
        cache.crop(-6)


MOVES: dict[str, tuple[Callable[[DynamicCache], None], list[int]]] = {
    "reordered": (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
    "repeated": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
    "selected": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
}


@pytest.mark.parametrize("length", [12, 60])
@pytest.mark.parametrize("move", MOVES)
def test_rows_move_with_everything_that_belongs_to_them(model: PreTrainedModel, move: str, length: int) -> None:
    ids, mask = IDS[:, -length:], torch.ones(2, length, dtype=torch.long)
    mask[1, : length - 10] = 0
    handle = snapkv(model, trace=True)
    cache, (change, rows) = handle.new_cache(), MOVES[move]
    model(ids, attention_mask=mask, past_key_values=cache)
    moved, steps = copy.deepcopy(cache), prompt(4, batch=2)
    change(moved)
    for given in (steps[:, :3], steps[:, 3:]):
        expected = model(given, past_key_values=cache).logits[rows]
        assert torch.allclose(model(given[rows], past_key_values=moved).logits, expected, atol=1e-5)
    for layer, other in zip(moved.layers, cache.layers, strict=True):
        assert torch.equal(layer.start, other.start[rows])
        assert layer.kept is None if other.kept is None else torch.equal(layer.kept, other.kept[rows])


@pytest.mark.parametrize("kind", [torch.bool, torch.long])
@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 3}])
def test_protected_tokens_stay_in_every_mode(
    model: PreTrainedModel, kind: torch.dtype, mode: dict[str, object]
) -> None:
    protect = torch.zeros_like(IDS, dtype=kind)
    protect[:, 30:40] = 1
    handle = snapkv(model, trace=True)
    model.generate(IDS, attention_mask=MASK, protect_mask=protect, max_new_tokens=2, **mode)
    kept = handle.report().layers[1].kept
    copies = kept.shape[0] // 2
    for row, padding in enumerate([0] * copies + [19] * copies):
        for head in kept[row].tolist():
            assert set(range(30 - padding, 40 - padding)) <= set(head)


def test_protection_ends_with_the_call(model: PreTrainedModel) -> None:
    handle = snapkv(model, trace=True)
    cache, protect = handle.new_cache(), torch.zeros_like(IDS, dtype=torch.bool)
    protect[:, 30:40] = True
    model(IDS, attention_mask=MASK, past_key_values=cache)
    free = cache.layers[1].kept
    cache.reset()
    logits_of(model, past_key_values=cache, protect_mask=protect)
    assert not torch.equal(cache.layers[1].kept, free)
    cache.reset()
    model(IDS, attention_mask=MASK, past_key_values=cache)
    assert torch.equal(cache.layers[1].kept, free)
