"""A cache goes on in every mode of autograd, whichever it was filled in, as those of transformers do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

import llm_accel
from llm_accel.cache import headroom
from llm_accel.registry import configure, parse_all
from tests.contracts.laws import EXACT
from tests.contracts.variants import every_variant
from tests.tiny import left_padded, prompt, tiny_model

MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "grad": torch.enable_grad,
}
# of the prompt, of the steps after it, of the second turn, and of the steps after that
ORDERS = (
    ("inference", "no_grad", "no_grad", "no_grad"),
    ("inference", "grad", "grad", "grad"),
    ("no_grad", "inference", "inference", "inference"),
    ("grad", "inference", "inference", "inference"),
    ("inference", "grad", "inference", "no_grad"),
    ("grad", "inference", "grad", "inference"),
)
PLAIN = ("no_grad",) * 4
every_order = pytest.mark.parametrize("order", ORDERS, ids="-".join)
every_padding = pytest.mark.parametrize("lengths", [(60,), (60, 41)], ids=["single", "padded"])
inside_and_outside = pytest.mark.parametrize(("first", "then"), [("inference", "grad"), ("grad", "inference")])


def applied(model: PreTrainedModel, method: str) -> llm_accel.Handle:
    return llm_accel.apply(model, parse_all(method) or configure("dense", {}))


def talk(model: PreTrainedModel, cache: DynamicCache, lengths: tuple[int, ...], order: tuple[str, ...]) -> list[Tensor]:
    """The last logits of each call of a conversation of two turns on one cache, whose parts run in these modes."""
    ids, mask = left_padded(list(lengths))
    rows, logits = len(lengths), []
    parts = [[ids], prompt(3, 5, rows).split(1, 1), [prompt(9, 6, rows)], prompt(3, 7, rows).split(1, 1)]
    for mode, part in zip(order, parts, strict=True):
        with MODES[mode]():
            for tokens in part:
                seen = cache.get_seq_length() + tokens.shape[1]
                whole = torch.nn.functional.pad(mask, (0, seen - mask.shape[1]), value=1)
                output = model(tokens, attention_mask=whole, past_key_values=cache)
                logits.append(output.logits[:, -1].detach())
    return logits


def check_same(ours: list[Tensor], plain: list[Tensor]) -> None:
    for one, other in zip(ours, plain, strict=True):
        assert (one - other).abs().max() <= EXACT


@every_padding
@every_order
@every_variant
def test_a_conversation_in_changing_modes(method: str, order: tuple[str, ...], lengths: tuple[int, ...]) -> None:
    model = tiny_model("llama")
    with applied(model, method) as handle:
        plain = talk(model, handle.new_cache(), lengths, PLAIN)
        check_same(talk(model, handle.new_cache(), lengths, order), plain)


@pytest.mark.parametrize("order", ORDERS[::2], ids="-".join)
@pytest.mark.parametrize("method", ["snapkv:budget=48,window=8", "dense:capacity=64"])
def test_caches_with_room_for_more(method: str, order: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    with applied(model, method) as handle:
        plain = talk(model, handle.new_cache(), (60, 41), PLAIN)
        monkeypatch.setattr(headroom, "LONG", 32)
        check_same(talk(model, handle.new_cache(), (60, 41), order), plain)


@inside_and_outside
@every_variant
def test_generate_goes_on_from_a_cache_that_was_read_saved_or_copied(
    method: str, first: str, then: str, tmp_path: Path
) -> None:
    model, (ids, mask) = tiny_model("llama"), left_padded([60, 41])
    whole, answers = torch.nn.functional.pad(mask, (0, 2), value=1), []

    def generate(ids: Tensor, mask: Tensor, cache: DynamicCache, new: int) -> Tensor:
        return model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=new, do_sample=False)

    with applied(model, method) as handle:
        plain_cache = handle.new_cache()
        begun = generate(ids, mask, plain_cache, 2)
        plain = generate(begun, whole, plain_cache, 4)
        with MODES[first]():
            cache = handle.new_cache()
            generate(ids, mask, cache, 2)
            handle.save_cache(cache, tmp_path / "inside")
            caches = [copy.deepcopy(cache), handle.load_cache(tmp_path / "inside")]
            read = handle.prefill(ids, attention_mask=mask, rows=1) if handle.can_prefill else None
        with MODES[then]():
            handle.save_cache(cache, tmp_path / "outside")
            caches.append(handle.load_cache(tmp_path / "outside"))
            for one in (*caches, copy.deepcopy(cache), cache):
                answers.append(generate(begun, whole, one, 4))
            if read is not None:
                once = model.generate(**read.inputs, max_new_tokens=2, do_sample=False)
                answers.append(generate(once, whole, read, 4))
    assert len(answers) >= 5
    assert all(torch.equal(answer, plain) for answer in answers)


@inside_and_outside
@pytest.mark.parametrize("method", ["adakv:budget=24,window=8,page=8", "h2o:budget=24", "snapkv:budget=24,window=8"])
def test_a_prompt_that_was_read_goes_on_by_hand(method: str, first: str, then: str) -> None:
    """What the decoder said after its last token meets weights that want a gradient."""
    model, (ids, _) = tiny_model("llama"), left_padded([60])
    with applied(model, method) as handle:
        plain = talk(model, handle.new_cache(), (60,), PLAIN)[:4]
        with MODES[first]():
            read = handle.prefill(ids)
        with MODES[then]():
            steps = (read.inputs["input_ids"][:, -1:], *prompt(3, 5).split(1, 1))
            check_same([model(token, past_key_values=read).logits[:, -1].detach() for token in steps], plain)
