"""What common clients send, and what they look for in an answer and in an error."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

import llm_accel
from tests.eval.needle_helpers import tiny_model, tokenizer
from tests.serve.kit import ALICE, Running, start

PARTS = [{"type": "text", "text": "The dog", "cache_control": {"type": "ephemeral"}}]
CHAT: dict[str, Any] = {"model": "needle", "messages": [{"role": "user", "content": "The dog"}], "max_tokens": 2}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}
HEADERS = {"Authorization": f"Bearer {ALICE}"}


@pytest.fixture(scope="module")
def strict() -> Iterator[Running]:
    """A server that refuses unknown fields; no limit but the context of 1024 tokens."""
    running = start(tiny_model(), tokenizer(), strict_fields=True, max_batch=4)
    yield running
    running.stop()


def chat(running: Running, **fields: Any) -> httpx.Response:
    return running.post("/v1/chat/completions", CHAT | fields)


def error(response: httpx.Response, status: int = 400) -> Any:
    assert response.status_code == status, response.text
    return response.json()["error"]


NEUTRAL: dict[str, Any] = {
    "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0, "top_k": -1, "min_p": 0, "logit_bias": {},
    "ignore_eos": False, "skip_special_tokens": True, "add_generation_prompt": True, "parallel_tool_calls": True,
    "store": False, "service_tier": "auto", "metadata": {}, "user": "u", "tools": [TOOL], "tool_choice": "none",
    "functions": [{"name": "f"}], "function_call": "none", "response_format": {"type": "text"}, "best_of": 1, "n": 1,
    "use_beam_search": False, "length_penalty": 1.0, "reasoning_effort": "low", "stop": None, "stop_token_ids": [],
    "min_tokens": 0, "chat_template_kwargs": {"enable_thinking": False}, "guided_json": None,
}  # fmt: skip


def test_values_that_ask_for_nothing_change_nothing(running: Running, strict: Running) -> None:
    expected = chat(running).json()["choices"]
    answer = chat(running, **NEUTRAL)
    assert answer.json()["choices"] == expected and "x-llm-accel-ignored" not in answer.headers
    assert chat(strict, **NEUTRAL).status_code == 200
    assert chat(running, top_k=0).json()["choices"] == expected


UNKNOWN: dict[str, Any] = {
    "priority": 0, "prompt_cache_key": "k", "safety_identifier": "s", "store": True, "verbosity": "low", "a\nb": 1,
    "stream_options": {"include_obfuscation": False}, "messages": [{"role": "user", "content": PARTS, "refusal": "r"}],
}  # fmt: skip


def test_unknown_fields_are_ignored_and_told(
    running: Running, strict: Running, caplog: pytest.LogCaptureFixture
) -> None:
    expected = chat(running).json()["choices"]
    with caplog.at_level(logging.WARNING):
        answers = [chat(running, **UNKNOWN) for _ in range(2)]
    for answer in answers:
        assert answer.json()["choices"] == expected
        assert answer.headers["x-llm-accel-ignored"].split(", ") == [
            "a?b", "cache_control", "include_obfuscation", "priority", "prompt_cache_key", "refusal",
            "safety_identifier", "store", "verbosity",
        ]  # fmt: skip
    warned = [record.getMessage() for record in caplog.records if "not known here" in record.getMessage()]
    assert len(warned) == 9 and not any("\n" in line for line in warned)  # one for each, however often it comes
    for name, value in UNKNOWN.items():
        assert "unknown" in error(chat(strict, **{name: value}))["message"]


def test_many_unknown_names_are_told_in_part(running: Running) -> None:
    told = chat(running, **{f"{'x' * 60}{number}": 1 for number in range(50)}).headers["x-llm-accel-ignored"]
    assert told == "x" * 40
    told = chat(running, **{f"field{number}": 1 for number in range(50)}).headers["x-llm-accel-ignored"]
    assert len(told.split(", ")) == 32
    assert "unknown" in error(chat(running, **{"x" * 101: 1}))["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [TOOL]),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("guided_json", {"type": "object"}),
        ("guided_regex", "a+"),
        ("structured_outputs", {"regex": "a+"}),
    ],
)
def test_tools_and_structured_output_are_refused_with_a_way_out(running: Running, field: str, value: Any) -> None:
    told = error(chat(running, **{field: value}))
    assert told["param"] == field and "vLLM" in told["message"] and told["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("field", "value"),
    [("best_of", 2), ("suffix", "x"), ("use_beam_search", True), ("bad_words", ["x"]), ("length_penalty", 2.0)],
)
def test_what_would_change_the_answer_is_refused_and_not_ignored(running: Running, field: str, value: Any) -> None:
    assert error(running.complete(**{field: value}))["param"] == field


def test_errors_have_the_codes_that_clients_look_for(running: Running, strict: Running) -> None:
    with pytest.raises(openai.NotFoundError) as absent:
        running.client().chat.completions.create(model="gpt", messages=CHAT["messages"])
    assert (absent.value.code, absent.value.param, absent.value.type) == (
        "model_not_found", "model", "invalid_request_error",
    )  # fmt: skip
    with pytest.raises(openai.AuthenticationError) as unknown:
        running.client("key-of-mallory").models.list()
    assert unknown.value.code == "invalid_api_key"
    long: list[dict[str, Any]] = [{"prompt": [5] * 1000, "max_tokens": 25}, {"prompt": [5] * 1024}]
    long += [{"prompt": [5] * 1025}, {"prompt": "The dog " * 1000}, {"max_tokens": 1024}, {"prompt": "a" * 17_000}]
    long += [{"prompt": [5] * 1000, "max_tokens": None, "min_tokens": 25}]
    for fields in long:
        told = error(strict.complete(**fields))
        assert told["code"] == "context_length_exceeded"
        assert "This model's maximum context length is 1024 tokens" in told["message"]
    assert error(chat(running, temperature=-1))["param"] == "temperature"
    with running.held(), pytest.raises(openai.RateLimitError) as full:
        running.server.engine.scheduler._reading = 6
        try:
            running.client().completions.create(model="needle", prompt="x")
        finally:
            running.server.engine.scheduler._reading = 0
    assert full.value.type == "rate_limit_error" and int(full.value.response.headers["retry-after"]) >= 1


def test_answers_may_fill_the_context(strict: Running) -> None:
    answer = strict.complete([5] * 24, max_tokens=1000, ignore_eos=True).json()
    assert answer["usage"]["completion_tokens"] == 1000 and answer["choices"][0]["finish_reason"] == "length"
    assert strict.complete([5] * 1000, max_tokens=None, ignore_eos=True).json()["usage"]["completion_tokens"] == 24


def test_prompt_lists_of_any_length(running: Running) -> None:
    prompts = [f"The dog {number}" for number in range(11)]  # the server runs 4 at a time
    single = [running.complete(prompt).json()["choices"][0] for prompt in prompts]
    answer = running.complete(prompts).json()
    assert answer["choices"] == [one | {"index": index} for index, one in enumerate(single)]
    pairs = running.complete(prompts, n=2).json()["choices"]
    assert [one["text"] for one in pairs] == [one["text"] for one in single for _ in range(2)]
    events = [line.removeprefix("data: ") for line in running.complete(prompts, stream=True).text.split("\n\n") if line]
    texts = dict.fromkeys(range(11), "")
    for event in events[:-1]:
        [choice] = json.loads(event)["choices"]
        texts[choice["index"]] += choice["text"]
    assert list(texts.values()) == [one["text"] for one in single] and events[-1] == "[DONE]"
    sampled = {"temperature": 1.0, "seed": 3, "n": 6}
    assert len({one["text"] for one in running.complete(**sampled).json()["choices"]}) > 1
    assert running.complete(**sampled).json()["choices"] == running.complete(**sampled).json()["choices"]


def test_other_requests_run_between_the_prompts_of_a_long_list(running: Running) -> None:
    order: list[str] = []
    from concurrent.futures import ThreadPoolExecutor

    def ask(name: str, prompt: Any, tokens: int) -> None:
        running.complete(prompt, max_tokens=tokens, ignore_eos=True)
        order.append(name)

    with ThreadPoolExecutor(2) as pool:
        with running.held():
            list_of_prompts = pool.submit(ask, "list", ["The dog"] * 20, 8)
            while not running.busy():
                pass
            single = pool.submit(ask, "single", "12 345", 1)
            while len(running.server.engine.scheduler) < 1:
                pass
        list_of_prompts.result(), single.result()
    assert order == ["single", "list"]


def test_request_ids_come_back(running: Running) -> None:
    url = f"{running.url}/v1/models"
    given = running.http.get(url, headers=HEADERS | {"X-Request-Id": "trace:4.b-2_1"})
    assert given.headers["x-request-id"] == "trace:4.b-2_1"
    made = {running.http.get(url, headers=HEADERS | {"X-Request-Id": bad}).headers["x-request-id"] for bad in (
        "", "a b", "x" * 200,
    )}  # fmt: skip
    assert len(made) == 3 and all(len(one) == 32 for one in made)
    assert running.http.get(url).headers["x-request-id"] and chat(running, stream=True).headers["x-request-id"]
    answer = running.client().chat.completions.create(model="needle", messages=CHAT["messages"], max_tokens=1)
    assert answer._request_id and len(answer._request_id) == 32


def test_tokens_and_text(running: Running) -> None:
    coder = tokenizer()
    ids = coder("The dog")["input_ids"]
    told = running.post("/tokenize", {"model": "needle", "prompt": "The dog"}).json()
    assert told == {"count": len(ids), "max_model_len": 16384, "tokens": ids}
    plain = running.post("/tokenize", {"prompt": "The dog", "add_special_tokens": False}).json()["tokens"]
    assert plain == coder("The dog", add_special_tokens=False)["input_ids"] != ids
    turns = running.post("/tokenize", {"messages": CHAT["messages"], "add_generation_prompt": False}).json()
    expected = coder.apply_chat_template(CHAT["messages"], return_dict=False)
    assert turns["tokens"] == expected
    assert turns["count"] < chat(running).json()["usage"]["prompt_tokens"]
    assert running.post("/detokenize", {"tokens": ids}).json() == {"prompt": coder.decode(ids)}
    for path, body, says in (
        ("/tokenize", {}, "either 'prompt' or 'messages'"),
        ("/tokenize", {"prompt": "x", "messages": CHAT["messages"]}, "either 'prompt' or 'messages'"),
        ("/tokenize", {"prompt": "word " * 9000}, "1000 are allowed"),
        ("/detokenize", {"tokens": [10**6]}, "token ids are below"),
        ("/detokenize", {"tokens": "x"}, "give a list"),
    ):
        assert says in error(running.post(path, body))["message"]
    assert error(running.post("/tokenize", {"model": "gpt", "prompt": "x"}), 404)["code"] == "model_not_found"
    assert running.http.post(f"{running.url}/tokenize", json={"prompt": "x"}).status_code == 401


def test_version_and_length_of_the_context(running: Running) -> None:
    assert running.http.get(f"{running.url}/version", headers=HEADERS).json() == {"version": llm_accel.__version__}
    model: Any = running.client().models.retrieve("needle")
    assert model.max_model_len == 16384 == model.llm_accel["context"]


def test_the_description_of_a_lenient_server_allows_more_fields(running: Running, strict: Running) -> None:
    def described(server: Running) -> Any:
        return server.http.get(f"{server.url}/openapi.json", headers=HEADERS).json()["components"]["schemas"]

    assert not any("additionalProperties" in described(running)[name] for name in ("ChatRequest", "Message"))
    assert all(described(strict)[name]["additionalProperties"] is False for name in ("ChatRequest", "Message"))
