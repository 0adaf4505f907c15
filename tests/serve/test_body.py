"""Bodies: what is counted while they arrive, and what is said about those that are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_accel.serve.body import MOST_PARTS, ValueCounter, parse_body
from llm_accel.serve.errors import ApiError
from llm_accel.serve.protocol import ChatRequest, CompletionRequest, Request

TEXT = st.text(st.sampled_from('ab\\",[]{}: \né😀'), max_size=12)
JSON = st.recursive(
    st.none() | st.integers() | st.booleans() | TEXT,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXT, inner, max_size=5),
    max_leaves=40,
)


def counts(value: Any) -> tuple[int, int]:
    """Texts, lists and objects of a JSON value; and its commas."""
    if isinstance(value, str):
        return 1, 0
    if not isinstance(value, list | dict):
        return 0, 0
    inner = [counts(one) for one in (value if isinstance(value, list) else [*value, *value.values()])]
    return 1 + sum(parts for parts, _ in inner), max(0, len(value) - 1) + sum(commas for _, commas in inner)


@given(value=JSON, ascii_only=st.booleans(), cuts=st.lists(st.integers(0, 400), max_size=8))
def test_what_is_counted_is_what_the_json_holds_however_it_is_cut(
    value: Any, ascii_only: bool, cuts: list[int]
) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    counter, begin = ValueCounter(10**9), 0
    for cut in [*sorted(cuts), len(body)]:
        counter.add(body[begin : max(begin, cut)])
        begin = max(begin, cut)
    assert (counter._openings + counter._quotes // 2, counter._commas) == counts(value)


@pytest.mark.parametrize("one", ["{}", "[]", '""', '"\\""', '"\\\\"'])
def test_more_parts_than_any_request_needs(one: str) -> None:
    body = ("[" + ",".join([one] * MOST_PARTS)).encode()
    counter = ValueCounter(10**9)
    counter.add(body[: -2 * len(one)])
    with pytest.raises(ApiError, match=f"JSON has over {MOST_PARTS} texts, lists and objects"):
        counter.add(body[-2 * len(one) :])
    with pytest.raises(ApiError, match="JSON has over 7 values"):
        ValueCounter(7).add(b"[1,2,3,4,5,6,7,8,9]")
    ValueCounter(7).add(b'[1,2,3,4,5,6,7,"8,9,10,11"]')


USER = {"role": "user", "content": "x"}
CHAT = {"model": "m", "messages": [USER]}
TEXTS = {"model": "m", "prompt": "x"}


def told(kind: type[Request], body: Any) -> str:
    with pytest.raises(ApiError) as caught:
        parse_body(kind, body if isinstance(body, bytes) else json.dumps(body).encode())
    assert caught.value.status == 400
    return caught.value.message


WRONG: list[tuple[Any, str]] = [
    (b"{", "the body is no valid JSON: EOF while parsing an object at line 1 column 1."),
    (b'{"a":NaN}', "the body is no valid JSON: expected value at line 1 column 6."),
    (b"1" * 10**6, "the body is no valid JSON: number out of range at line 1 column 4302."),
    (b'{"model":"\\ud800"}', "the body is no valid JSON: unexpected end of hex escape at line 1 column 17."),
    ([], "the body: give an object."),
    ({}, "model: is missing."),
    (CHAT | {"messages": []}, "messages: give at least 1 items."),
    (CHAT | {"messages": "x"}, "messages: give a list."),
    (CHAT | {"messages": [1] * 5000}, "messages.0: give an object."),
    (CHAT | {"messages": [USER] * 5000}, "messages: give at most 4096 items."),
    (
        CHAT | {"messages": [USER | {"role": "x"}]},
        "messages.0.role: give 'system', 'developer', 'user', 'assistant' or 'tool'.",
    ),
    (CHAT | {"messages": [USER | {"content": 4}]}, "messages.0.content: give a text or a list of parts."),
    (CHAT | {"messages": [USER | {"content": None}]}, "messages.0.content: is missing."),
    (CHAT | {"messages": [USER | {"content": [3]}]}, "messages.0.content.0: give an object."),
    (CHAT | {"messages": [USER | {"content": [{}]}]}, "messages.0.content.0: give an object with a 'type'."),
    (
        CHAT | {"messages": [USER | {"content": [{"type": "x" * 5000}]}]},
        "messages.0.content.0: give 'text', 'image_url' as the 'type'.",
    ),
    (
        CHAT | {"messages": [USER | {"content": [{"type": "text", "text": 3}]}]},
        "messages.0.content.0.text: give a text.",
    ),
    (
        CHAT | {"messages": [USER | {"content": [{"type": "image_url", "image_url": {"url": None}}]}]},
        "messages.0.content.0.image_url.url: is missing.",
    ),
    (
        CHAT | {"messages": [USER | {"content": [{"type": "text", "text": ""}] * 2000}]},
        "messages.0.content: give at most 1024 items.",
    ),
    (CHAT | {"messages": [USER | {"name": "x" * 600}]}, "messages.0.name: give at most 512 characters."),
    (CHAT | {"model": "x" * 600}, "model: give at most 500 characters."),
    (CHAT | {"temperature": "hot"}, "temperature: give a number."),
    (CHAT | {"temperature": 10**400}, "temperature: give a number."),
    (CHAT | {"temperature": -1}, "temperature: give at least 0.0."),
    (CHAT | {"top_p": 0}, "top_p: give a number above 0.0."),
    (CHAT | {"n": 10**4000}, "n: give at most 9223372036854775807."),
    (CHAT | {"n": 1.5}, "n: give an integer."),
    (CHAT | {"seed": 2**63}, "seed: give at most 9223372036854775807."),
    (CHAT | {"seed": -(2**63) - 1}, "seed: give at least -9223372036854775808."),
    (CHAT | {"top_k": 2**63}, "top_k: give at most 9223372036854775807."),
    (CHAT | {"top_logprobs": 21}, "top_logprobs: give at most 20."),
    (CHAT | {"logprobs": 1}, "logprobs: give true or false."),
    (CHAT | {"stop": 5}, "stop: give a text or a list of texts."),
    (CHAT | {"stop": ["a"] * 90_000}, "stop: give at most 16 items."),
    (CHAT | {"stop": [3] * 90_000}, "stop.0: give a text."),
    (CHAT | {"user": "x" * 600}, "user: give at most 512 characters."),
    (CHAT | {"metadata": {str(number): 1 for number in range(9000)}}, "metadata: give at most 16 entries."),
    (CHAT | {"metadata": {"a": "x" * 600}}, "metadata.a: give at most 512 characters."),
    (CHAT | {str(number): 1 for number in range(9000)}, "the body: give at most 64 fields."),
    (CHAT | {"logit_bias": {"x": 1}}, "logit_bias.x: give token ids as its keys."),
    (CHAT | {"logit_bias": {"5": 101}}, "logit_bias.5: give at most 100.0."),
    (CHAT | {"logit_bias": {str(number): 1 for number in range(9000)}}, "logit_bias: give at most 1024 entries."),
    (CHAT | {"repetition_penalty": 0}, "repetition_penalty: give at least 0.01."),
    (CHAT | {"frequency_penalty": 2.5}, "frequency_penalty: give at most 2.0."),
    (CHAT | {"min_p": 1.5}, "min_p: give at most 1.0."),
    (CHAT | {"stop_token_ids": [-1]}, "stop_token_ids.0: give at least 0."),
    (CHAT | {"best_of": 2}, "best_of: unknown, or not supported with this value."),
    (
        CHAT | {"tools": [{"type": "function"}]},
        "tools: tools and structured output are not served here; vLLM with the llm_accel plug-in has them.",
    ),
    (
        CHAT | {"response_format": {"type": "json_object"}},
        "response_format: tools and structured output are not served here; vLLM with the llm_accel plug-in has them.",
    ),
    (CHAT | {"messages": [{"role": "tool"}]}, "messages.0.content: is missing."),
    (CHAT | {"messages": [USER | {"tool_calls": [{}]}]}, "messages.0.tool_calls.0.function: is missing."),
    (CHAT | {"x" * 5000: 1}, "x" * 40 + "...: unknown, or not supported with this value."),
    (CHAT | {"llm_accel": {"session": ""}}, "llm_accel.session: give at least 1 characters."),
    (CHAT | {"llm_accel": {"deadline_s": 10**400}}, "llm_accel.deadline_s: give a number."),
    (CHAT | {"llm_accel": 3}, "llm_accel: give an object."),
    (TEXTS | {"prompt": 5}, "prompt: give a text, a list of token ids, or a list of texts or of such lists."),
    (TEXTS | {"prompt": [1, "a"]}, "prompt.1: give an integer."),
    (TEXTS | {"prompt": ["a", 1]}, "prompt.1: give a text."),
    (TEXTS | {"prompt": [[1], []]}, "prompt.1: give at least 1 items."),
    (TEXTS | {"prompt": [-1]}, "prompt.0: give at least 0."),
]


@pytest.mark.parametrize(("body", "says"), WRONG, ids=[says[:60] for _, says in WRONG])
def test_one_complaint_in_our_own_words(body: Any, says: str) -> None:
    assert told(CompletionRequest if isinstance(body, dict) and "prompt" in body else ChatRequest, body) == says


def test_every_form_of_a_prompt_and_of_a_message() -> None:
    for prompt, prompts in (("a", ["a"]), (["a", ""], ["a", ""]), ([1, 2], [[1, 2]]), ([[1], [2]], [[1], [2]])):
        assert parse_body(CompletionRequest, json.dumps(TEXTS | {"prompt": prompt}).encode()).prompts == prompts
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "b"}}]
    chat = parse_body(ChatRequest, json.dumps(CHAT | {"messages": [USER | {"content": parts}], "stop": "x"}).encode())
    assert chat.stops == ("x",) and chat.messages[0].images == ["b"] and chat.messages[0].plain()["content"] == "a"


def test_messages_of_errors_are_short_and_name_no_objects() -> None:
    error = ApiError("bad_request", f"{object()!r} and {'x' * 10_000}")
    assert error.message.startswith("<object object> and") and len(error.message) < 700
    assert str(error.body()).count("0x") == 0
