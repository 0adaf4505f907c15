"""Long caches are appended to in place, and whatever is made from them is as if they had been copied."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from transformers import PreTrainedModel

import llm_accel
from llm_accel.cache import headroom
from llm_accel.cache.headroom import appended, gathered, selected
from llm_accel.registry import parse
from tests.tiny import left_padded, prompt


@pytest.fixture(autouse=True)
def long_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headroom, "LONG", 32)
    monkeypatch.setattr(headroom, "SHARE", 8)


def entries(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, count, 4, generator=torch.Generator().manual_seed(seed))


def test_steps_write_in_place_until_the_room_is_used_up() -> None:
    held = expected = entries(40)
    places = []
    for step in range(12):
        new = entries(1, step)
        held, expected = appended(held, new), torch.cat([expected, new], dim=2)
        assert torch.equal(held, expected)
        places.append(held.data_ptr())
    assert len(set(places)) == 2 and len(set(places[:6])) == 1  # room for 5 more after the first step


@pytest.mark.parametrize(
    "change",
    [
        lambda held: held[:, :, :-1],
        lambda held: held[:1],
        lambda held: held.index_select(0, torch.tensor([1, 0])),
        torch.clone,
        copy.deepcopy,
        lambda held: torch.load(_stored(held)),
    ],
    ids=["crop", "rows", "reorder", "clone", "deepcopy", "pickle"],
)
def test_what_is_made_from_it_shares_nothing_that_is_written(change) -> None:
    held = appended(entries(40), entries(1))
    other = change(held)
    before = other.clone()
    rows = len(other)
    longer, grown = appended(held, entries(1, 1)), appended(other, entries(1, 2)[:rows])
    assert torch.equal(longer[:, :, :41], held) and torch.equal(longer[:, :, 41:], entries(1, 1))
    assert torch.equal(grown, torch.cat([before, entries(1, 2)[:rows]], dim=2))


def test_a_tensor_may_be_appended_to_twice() -> None:
    """As by shallow copies of a cache."""
    held = appended(entries(40), entries(1))
    ours, theirs = appended(held, entries(1, 1)), appended(held, entries(1, 2))
    assert torch.equal(ours[:, :, 41:], entries(1, 1)) and torch.equal(theirs[:, :, 41:], entries(1, 2))
    assert torch.equal(ours[:, :, :41], theirs[:, :, :41])


def _stored(held: torch.Tensor) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(held, file)
    file.seek(0)
    return file


def test_modes_of_autograd_may_change_between_steps() -> None:
    with torch.inference_mode():
        held = appended(entries(40), entries(1))
    held = appended(held, entries(1, 1))
    with torch.inference_mode():
        held = appended(held, entries(1, 2))
    with torch.enable_grad():
        new = entries(1, 3).requires_grad_()
        appended(held, new).sum().backward()
    assert held.shape[2] == 43 and new.grad is not None


@pytest.mark.parametrize("method", ["snapkv:budget=48,window=8", "hip:sink=8,window=17,budget=16", "dense:capacity=64"])
def test_generation_is_that_of_copied_caches(
    method: str, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two turns of a padded batch with a copy of the cache between them, and beams."""
    ids, mask = left_padded([70, 51])
    options = {"max_new_tokens": 20, "do_sample": False}
    answers = []
    for least in (32, 10**6):
        monkeypatch.setattr(headroom, "LONG", least)
        with llm_accel.apply(model, parse(method)) as handle:
            cache = handle.new_cache()
            first = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
            stored = cache.layers[0]
            assert (stored.nbytes() > stored.keys.nbytes + stored.values.nbytes) is (least == 32)
            turn = torch.cat([first, ids[:, -5:]], dim=1)
            full = torch.nn.functional.pad(mask, (0, turn.shape[1] - mask.shape[1]), value=1)
            for one in (copy.deepcopy(cache), cache):
                answers.append(model.generate(turn, attention_mask=full, past_key_values=one, **options))
            answers += [first, model.generate(prompt(60), num_beams=3, **options)]
    for ours, copied in zip(answers[:4], answers[4:], strict=True):
        assert torch.equal(ours, copied)
    assert torch.equal(answers[0], answers[1])


def test_announced_tokens_get_headroom_once_a_copy_is_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many slots as are to come, whoever makes the tensor: a step, rows that come together, rows that stay."""
    monkeypatch.setattr(headroom, "LONG", 10**6)
    parts = [entries(20), entries(12, 1)]
    padded = torch.cat([parts[0], torch.nn.functional.pad(parts[1], (0, 0, 8, 0))])
    made = {
        "small": (gathered(parts, 5), padded),
        "ended": (selected(padded, torch.tensor([3, 0]), 0), padded[[3, 0]]),
    }
    monkeypatch.setattr(headroom, "LARGE", 1)
    made |= {
        "joined": (gathered(parts, 5), padded),
        "stayed": (selected(padded, torch.tensor([3, 0]), 5), padded[[3, 0]]),
        "appended": (appended(padded[:, :, :-1], padded[:, :, -1:], 5), padded),
    }
    for name, (held, expected) in made.items():
        ahead = 0 if name in ("small", "ended") else 5
        assert torch.equal(held, expected), name
        assert held.untyped_storage().nbytes() == held.nbytes // held.shape[2] * (held.shape[2] + ahead), name
        longer, places = held, set()
        for step in range(ahead):
            longer = appended(
                longer, entries(2, step)[: len(held), :, :1].repeat(len(held) // 2, 1, 1, 1), ahead - 1 - step
            )
            places.add(longer.data_ptr())
        assert len(places) <= 1 and torch.equal(longer[:, :, : held.shape[2]], expected), name
