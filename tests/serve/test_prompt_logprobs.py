"""``echo`` and ``prompt_logprobs``: log-likelihoods as lm-evaluation-harness asks for them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import llm_accel
from llm_accel.methods import Claim
from llm_accel.patches.cache_name import CACHE
from llm_accel.serve import logprobs
from llm_accel.serve.errors import ApiError
from llm_accel.serve.input_processor import _check_prompt_logprobs
from tests.contracts.matrix import LONG, METHODS
from tests.serve.kit import Running
from tests.serve.test_answers import needle_prompts
from tests.tiny import prompt, tiny_model


def of_the_model(needle: tuple[Any, Any], ids: list[int]) -> torch.Tensor:
    """Log-probabilities of every token after the first one, [S - 1]."""
    with torch.no_grad():
        known = needle[0](torch.tensor([ids])).logits[0].log_softmax(-1)
    return known[:-1].gather(-1, torch.tensor(ids)[1:, None])[:, 0]


@pytest.mark.parametrize("tokens", [0, 1, 3])
@pytest.mark.parametrize("method", ["snapkv:budget=128", "dense"])
def test_echo_says_the_prompt_and_its_probabilities(
    running: Running, needle: tuple[Any, Any], tokens: int, method: str
) -> None:
    ids = needle_prompts()[0]
    extension = {"llm_accel": {"method": method}}
    answer = running.complete(ids, echo=True, logprobs=2, max_tokens=tokens, **extension).json()
    choice, known = answer["choices"][0], answer["choices"][0]["logprobs"]
    plain = running.complete(ids, logprobs=2, max_tokens=max(tokens, 1), **extension).json()["choices"][0]
    assert answer["usage"]["completion_tokens"] == tokens and choice["finish_reason"] == "length"
    said = plain["text"] if tokens else ""
    assert choice["text"] == needle[1].decode(ids) + said
    assert known["token_logprobs"][0] is None is known["top_logprobs"][0]
    prompt = torch.tensor(known["token_logprobs"][1 : len(ids)])
    torch.testing.assert_close(prompt, of_the_model(needle, ids), atol=1e-5, rtol=1e-5)
    assert all(len(top) <= 2 for top in known["top_logprobs"][1:])
    assert known["tokens"] == [needle[1].decode([token]) for token in ids] + plain["logprobs"]["tokens"][:tokens]
    assert known["token_logprobs"][len(ids) :] == plain["logprobs"]["token_logprobs"][:tokens]
    lengths = [len(token) for token in known["tokens"]]
    assert known["text_offset"] == [sum(lengths[:place]) for place in range(len(lengths))]


def test_the_log_likelihood_of_lm_eval(running: Running, needle: tuple[Any, Any]) -> None:
    """It sends batches of token ids, and sums over the continuation without the generated token."""
    context, ends = needle_prompts()[0][:60], [[5, 6, 7], [9, 8]]
    batch = [context + end for end in ends]
    fields = {"max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1234}
    choices = running.complete(batch, **fields).json()["choices"]
    for choice, ids in zip(choices, batch, strict=True):
        found = sum(choice["logprobs"]["token_logprobs"][len(context) : -1])
        assert found == pytest.approx(float(of_the_model(needle, ids)[len(context) - 1 :].sum()), abs=1e-4)
        greedy = [
            value == max(top.values())
            for value, top in zip(
                choice["logprobs"]["token_logprobs"][1:-1], choice["logprobs"]["top_logprobs"][1:-1], strict=True
            )
        ]
        with torch.no_grad():
            best = needle[0](torch.tensor([ids])).logits[0].argmax(-1)[:-1]
        assert greedy == (best == torch.tensor(ids)[1:]).tolist()


def test_echo_alone_and_in_streams(running: Running) -> None:
    plain = running.complete("The dog").json()["choices"][0]
    assert running.complete("The dog", echo=True).json()["choices"][0] == plain | {"text": "The dog" + plain["text"]}
    whole = running.complete(["The dog", "12"], echo=True, logprobs=1, n=2).json()["choices"]
    assert [one["text"].startswith(said) for one, said in zip(whole, ("The dog", "The dog", "12", "12"), strict=True)]
    response = running.complete(["The dog", "12"], echo=True, logprobs=1, n=2, stream=True)
    texts, tokens = [""] * 4, [[], [], [], []]
    for line in response.text.split("\n\n"):
        if line and "[DONE]" not in line:
            [choice] = json.loads(line.removeprefix("data: "))["choices"]
            texts[choice["index"]] += choice["text"]
            tokens[choice["index"]] += zip(choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"], strict=True)
    assert texts == [one["text"] for one in whole]
    for found, one in zip(tokens, whole, strict=True):
        assert found == list(zip(one["logprobs"]["tokens"], one["logprobs"]["text_offset"], strict=True))


def test_prompt_logprobs_as_vllm_writes_them(running: Running, needle: tuple[Any, Any]) -> None:
    ids = needle[1]("The dog watched")["input_ids"]
    choice = running.complete(ids, prompt_logprobs=3).json()["choices"][0]
    assert choice["logprobs"] is None and choice["prompt_logprobs"][0] is None
    expected = of_the_model(needle, ids).tolist()
    for token, value, known in zip(ids[1:], expected, choice["prompt_logprobs"][1:], strict=True):
        assert known[str(token)]["logprob"] == pytest.approx(value, abs=1e-5)
        assert known[str(token)]["decoded_token"] == needle[1].decode([token]) and 3 <= len(known) <= 4
    chat = {"model": "needle", "messages": [{"role": "user", "content": "The dog"}], "prompt_logprobs": 0}
    answer = running.post("/v1/chat/completions", chat | {"max_tokens": 1}).json()
    assert len(answer["choices"][0]["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    assert "prompt_logprobs" not in running.complete(ids).json()["choices"][0]


def test_long_prompts_are_read_in_parts(
    running: Running, needle: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = needle_prompts()[0]
    monkeypatch.setattr(logprobs, "_AT_ONCE", 64)
    known = running.complete(ids, echo=True, logprobs=0, max_tokens=0).json()["choices"][0]["logprobs"]
    torch.testing.assert_close(
        torch.tensor(known["token_logprobs"][1:]), of_the_model(needle, ids), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("name", sorted(name for name in METHODS if Claim.ATTENTION not in METHODS[name]().claims))
def test_methods_that_may_have_them_read_the_prompt_like_the_dense_model(name: str) -> None:
    """What decides is whether a method claims attention; this is what that has to mean."""
    config = METHODS[name]()
    _check_prompt_logprobs([config])
    model, ids = tiny_model("llama"), prompt(LONG)
    with torch.no_grad():
        expected = model(ids).logits
        with llm_accel.apply(model, config) as handle:
            found = model(ids, **{CACHE: handle.new_cache()}).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spec", ["hip", "retrieval_heads", "snapkv:budget=40+hip"])
def test_methods_that_compute_attention_are_known(spec: str) -> None:
    with pytest.raises(ApiError, match="reads prompts otherwise"):
        _check_prompt_logprobs([llm_accel.registry.parse(one) for one in spec.split("+")])


def test_methods_that_read_prompts_otherwise_have_none(running: Running) -> None:
    for fields in ({"echo": True, "logprobs": 1}, {"prompt_logprobs": 1}):
        response = running.complete(**fields, llm_accel={"method": "retrieval_heads"})
        assert response.status_code == 400 and "give the method 'dense'" in response.json()["error"]["message"]
    assert running.complete(echo=True, llm_accel={"method": "retrieval_heads"}).status_code == 200
