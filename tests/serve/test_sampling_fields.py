"""Fields that change which token comes next, and what ends an answer: against plain ``generate`` and a loop by hand."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import MinPLogitsWarper

from llm_accel.serve.sampling import Sampling, choose
from tests.serve.kit import Running
from tests.serve.test_answers import needle_prompts

DENSE = {"llm_accel": {"method": "dense"}}
LENGTH = 24


def by_hand(
    needle: tuple[Any, Any], prompt: list[int], presence: float = 0, frequency: float = 0, bias: Any = None
) -> list[int]:
    """Greedy tokens one at a time, by the formula of OpenAI's documentation."""
    model, _ = needle
    tokens: list[int] = []
    for _ in range(LENGTH):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, -1].tolist()
        for token, value in (bias or {}).items():
            logits[int(token)] += value
        for token in set(tokens):
            logits[token] -= tokens.count(token) * frequency + presence
        tokens.append(logits.index(max(logits)))
        if tokens[-1] == model.generation_config.eos_token_id:
            break
    return tokens


def text(needle: tuple[Any, Any], tokens: list[int]) -> str:
    return str(needle[1].decode(tokens, skip_special_tokens=True))


@pytest.mark.parametrize(
    "fields",
    [{"presence_penalty": 2.0}, {"frequency_penalty": 1.5}, {"presence_penalty": -2.0, "frequency_penalty": 2.0}],
    ids=str,
)
def test_penalties_on_what_was_said(running: Running, needle: tuple[Any, Any], fields: dict[str, float]) -> None:
    ids = needle[1]("The dog watched the old river. The dog")["input_ids"]
    short = {name.removesuffix("_penalty"): value for name, value in fields.items()}
    expected = text(needle, by_hand(needle, ids, **short))
    plain, answer = (running.complete(ids, max_tokens=LENGTH, **DENSE, **more).json() for more in ({}, fields))
    assert answer["choices"][0]["text"] == expected != plain["choices"][0]["text"]


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty_is_that_of_transformers(running: Running, needle: tuple[Any, Any], penalty: float) -> None:
    model, tokenizer = needle
    ids = tokenizer("The dog watched the old river. The dog")["input_ids"]
    row = model.generate(torch.tensor([ids]), max_new_tokens=LENGTH, do_sample=False, repetition_penalty=penalty)
    answer = running.complete(ids, max_tokens=LENGTH, repetition_penalty=penalty, **DENSE).json()
    assert answer["choices"][0]["text"] == tokenizer.decode(row[0, len(ids) :], skip_special_tokens=True)
    assert (
        answer["choices"][0]["text"] != running.complete(ids, max_tokens=LENGTH, **DENSE).json()["choices"][0]["text"]
    )


def test_logit_bias(running: Running, needle: tuple[Any, Any]) -> None:
    ids = needle[1]("The dog")["input_ids"]
    first = by_hand(needle, ids)[0]
    bias = {str(first): -100, "70": 3.5}
    answer = running.complete(ids, max_tokens=LENGTH, logit_bias=bias, **DENSE).json()["choices"][0]["text"]
    assert answer == text(needle, by_hand(needle, ids, bias=bias)) != text(needle, by_hand(needle, ids))
    forced = running.complete(ids, max_tokens=5, logit_bias={"70": 100}).json()["choices"][0]["text"]
    assert forced == text(needle, [70] * 5)


def test_rows_of_a_batch_keep_their_own_fields(running: Running) -> None:
    fields: list[dict[str, Any]] = [
        {}, {"repetition_penalty": 1.4}, {"frequency_penalty": 2.0, "min_tokens": 9}, {"logit_bias": {"70": 6}},
    ]  # fmt: skip
    prompts = [ids[:100] for ids in needle_prompts()]

    def ask(pair: tuple[list[int], dict[str, Any]]) -> Any:
        return running.complete(pair[0], max_tokens=12, **pair[1]).json()["choices"]

    pairs = list(zip(prompts, fields, strict=True))
    alone = [ask(pair) for pair in pairs]
    with ThreadPoolExecutor(len(pairs)) as pool:
        assert list(pool.map(ask, pairs)) == alone


def test_min_p_is_that_of_transformers() -> None:
    logits, settings = torch.linspace(0, 6, 50)[None], Sampling(temperature=0.8, min_p=0.2)
    draws = [(number + 0.5) / 4000 for number in range(4000)]
    chosen = choose(logits.expand(4000, -1).clone(), [settings] * 4000, draws)
    expected = MinPLogitsWarper(0.2)(torch.empty(1, 0), logits / 0.8).softmax(-1)[0]
    assert 1 < int((expected > 0).sum()) < 20
    assert (torch.bincount(chosen, minlength=50) / 4000 - expected).abs().max() < 1e-3


def test_min_p_reaches_the_sampling(running: Running) -> None:
    greedy = running.complete(max_tokens=12).json()["choices"][0]["text"]
    sampled = running.complete(max_tokens=12, temperature=2.0, min_p=1.0).json()["choices"][0]["text"]
    assert sampled == greedy


def test_what_ends_an_answer(running: Running, needle: tuple[Any, Any]) -> None:
    model, tokenizer = needle
    end = model.generation_config.eos_token_id
    plain = running.complete(max_tokens=12).json()["choices"][0]["text"]
    ids = tokenizer("The dog")["input_ids"]
    row = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
    assert text(needle, row) == plain
    stop = next(token for token in row[3:] if token not in row[:3])
    cut = running.complete(max_tokens=12, stop_token_ids=[stop, 10**9]).json()["choices"][0]
    assert cut["finish_reason"] == "stop" and cut["text"] == text(needle, row[: row.index(stop)])
    # the end of the answer is made the likeliest token
    push = {"max_tokens": 6, "logit_bias": {str(end): 100}}
    ended = running.complete(**push).json()
    assert ended["choices"][0] | {"text": ""} == {"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}
    assert ended["usage"]["completion_tokens"] == 1
    later = running.complete(**push, min_tokens=4).json()
    assert later["usage"]["completion_tokens"] == 5 and later["choices"][0]["finish_reason"] == "stop"
    assert later["choices"][0]["text"] == text(needle, row[:4])
    on = running.complete(**push, ignore_eos=True, skip_special_tokens=False).json()
    assert on["usage"]["completion_tokens"] == 6 and on["choices"][0]["finish_reason"] == "length"
    assert on["choices"][0]["text"] == tokenizer.decode([end]) * 6
    assert running.complete(**push, ignore_eos=True).json()["choices"][0]["text"] == ""


def test_stop_strings_wait_for_the_minimum(running: Running) -> None:
    plain = running.complete(max_tokens=12).json()["choices"][0]["text"]
    first = plain.strip()[:1]
    assert running.complete(max_tokens=12, stop=first).json()["choices"][0]["finish_reason"] == "stop"
    waited = running.complete(max_tokens=12, stop=first, min_tokens=12).json()
    assert waited["choices"][0]["text"] == plain and waited["usage"]["completion_tokens"] == 12


def test_a_minimum_above_the_maximum_is_refused(running: Running) -> None:
    response = running.complete(max_tokens=3, min_tokens=4)
    assert response.status_code == 400 and "min_tokens=4 is more than max_tokens=3" in response.text
