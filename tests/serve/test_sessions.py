"""Conversations that keep their cache: what a kept cache answers, whose it is, and when it goes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

import llm_accel
from llm_accel.cache.linear import states_of
from llm_accel.methods import MethodConfig, SnapKV
from llm_accel.serve.conversations import Conversation, Conversations
from tests.families.build import text_model
from tests.serve.kit import ALICE, BOB, Running
from tests.serve.test_answers import needle_prompts
from tests.serve.test_engine import Driven
from tests.tiny import left_padded


def turn(running: Running, prompt: list[int], session: str = "talk", key: str = ALICE, **more: Any) -> tuple[str, int]:
    """The answer, and how many tokens of the prompt were in a kept cache."""
    extension = {"session": session, **more}
    answer = running.complete(prompt, key=key, max_tokens=4, llm_accel=extension).json()
    return answer["choices"][0]["text"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_later_turns_go_on_with_the_compressed_cache(running: Running, needle: tuple[Any, Any]) -> None:
    model, tokenizer = needle
    first, second = needle_prompts()[0], needle_prompts()[1][:50]
    with llm_accel.apply(model, "snapkv", budget=128) as handle:
        cache = handle.new_cache()
        one = model.generate(torch.tensor([first]), past_key_values=cache, max_new_tokens=4, do_sample=False)
        longer = [*one[0].tolist(), *second]
        two = model.generate(torch.tensor([longer]), past_key_values=cache, max_new_tokens=4, do_sample=False)
    said = tokenizer.decode(one[0, len(first) :], skip_special_tokens=True)
    assert turn(running, first) == (said, 0)
    expected = tokenizer.decode(two[0, len(longer) :], skip_special_tokens=True)
    assert turn(running, longer) == (expected, len(first) + 3)  # the last token was never fed
    running.idle()
    metrics = running.metrics()
    assert metrics["llm_accel_sessions"] >= 1 and metrics["llm_accel_session_bytes"] > 0


def test_keys_names_methods_and_edits_do_not_mix(running: Running) -> None:
    first = needle_prompts()[0][:100]
    longer = first + needle_prompts()[1][:30]
    turn(running, first)
    assert turn(running, longer, key=BOB)[1] == 0
    assert turn(running, longer, session="other")[1] == 0
    turn(running, first, session="talk")
    assert turn(running, longer, method="dense")[1] == 0
    turn(running, first)
    assert turn(running, longer[1:])[1] == 0
    turn(running, first)
    assert turn(running, first)[1] == 0  # nothing new to say


def test_the_one_unused_longest_goes_first(running: Running) -> None:
    first = needle_prompts()[0][:60]
    longer = first + needle_prompts()[1][:30]
    for name in ("a", "b", "c"):
        turn(running, first, session=name)
    running.idle()
    assert running.metrics()["llm_accel_sessions"] == 2
    assert turn(running, longer, session="a")[1] == 0


def test_bounds_in_bytes() -> None:
    kept = Conversations(limit=10, byte_limit=100)
    methods = (SnapKV(budget=40),)
    for name, size in (("a", 60), ("b", 30), ("c", 50)):
        kept.keep(("", name), Conversation((1, 2), None, methods, size))
    assert len(kept) == 2 and kept.nbytes == 80 and kept.take(("", "a"), (1, 2, 3), methods) is None
    kept.keep(("", "huge"), Conversation((1,), None, methods, 101))
    assert kept.take(("", "huge"), (1, 2), methods) is None and kept.nbytes <= 100


@pytest.mark.parametrize("methods", [(SnapKV(budget=40),), ()], ids=["snapkv", "dense"])
def test_states_of_linear_attention_count_among_the_bytes(methods: tuple[MethodConfig, ...]) -> None:
    async def kept() -> Conversations:
        driven = Driven(text_model("qwen3_next"))
        driven.submit([tuple(left_padded([60])[0][0].tolist())], methods, 2, session=("", "a"))
        driven.finish()
        return driven.engine._conversations

    conversations = asyncio.run(kept())
    [cache] = [one.cache for one in conversations._kept.values()]
    tensors = [t for layer in cache.layers for t in (*states_of(layer).values(), *entries_of(layer))]
    assert conversations.nbytes == sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    assert any(states_of(layer) for layer in cache.layers)


def entries_of(layer: Any) -> list[torch.Tensor]:
    return [tensor for name in ("keys", "values") if (tensor := getattr(layer, name, None)) is not None]
