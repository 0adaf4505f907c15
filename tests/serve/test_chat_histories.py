"""What histories may hold, and what a request may tell the template: tools, empty content, options."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest

from tests.eval.needle_helpers import tiny_model, tokenizer
from tests.serve.kit import Running, start

CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"place": "river"}'}}
HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "The dog"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "name": "look", "content": "an old river"},
]
READS_TOOLS = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }} {{ call.function.arguments.place }}"
    "{% if call.function.arguments == {} %}{{ raise_exception('a call without arguments') }}{% endif %}{% endfor %}"
    "{% endfor %}{% if thinking is defined and not thinking %} quiet{% endif %}{{ reasoning_effort or '' }}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def reader() -> Iterator[Running]:
    """A server whose template reads tools."""
    coder = copy.deepcopy(tokenizer())
    coder.chat_template = READS_TOOLS
    running = start(tiny_model(), coder)
    yield running
    running.stop()


def rendered(server: Running, messages: Any, **fields: Any) -> str:
    """What the template made of a chat."""
    body = {"messages": messages, **fields}
    tokens = server.post("/tokenize", body)
    assert tokens.status_code == 200, tokens.text
    chat = server.post("/v1/chat/completions", body | {"model": "needle", "max_tokens": 1}).json()
    assert chat["usage"]["prompt_tokens"] == tokens.json()["count"]
    return str(server.post("/detokenize", {"tokens": tokens.json()["tokens"]}).json()["prompt"])


def refusal(server: Running, messages: Any, **fields: Any) -> str:
    body = {"model": "needle", "messages": messages, "max_tokens": 1, **fields}
    response = server.post("/v1/chat/completions", body)
    assert response.status_code == 400, response.text
    return str(response.json()["error"]["message"])


def test_turns_with_tools_go_through_the_template(reader: Running) -> None:
    said = rendered(reader, HISTORY)
    assert said == "<user>The dog<assistant>look river<tool>an old river<assistant>"
    parts = [{"type": "text", "text": "an old river"}]
    assert rendered(reader, [*HISTORY[:2], HISTORY[2] | {"content": parts}]) == said


def test_arguments_that_are_no_json_stay_text(reader: Running) -> None:
    for arguments in ("", "[" * 1000, "[" * 900 + "]" * 900):  # the parser gives up on deep ones
        call = CALL | {"function": {"name": "look", "arguments": arguments}}
        assert rendered(reader, [*HISTORY[:1], HISTORY[1] | {"tool_calls": [call]}]).count("look ") == 1


@pytest.mark.parametrize("messages", [HISTORY, HISTORY[:2]], ids=["call and result", "call"])
def test_a_template_that_leaves_tools_out_is_no_silent_loss(running: Running, messages: list[dict[str, Any]]) -> None:
    """The bundled template writes the content of every role, and no calls."""
    assert "leaves turns with tools out" in refusal(running, messages)
    body = {"model": "needle", "messages": [HISTORY[0], HISTORY[2]], "max_tokens": 1}
    assert running.post("/v1/chat/completions", body).status_code == 200


def test_answers_without_content(reader: Running, running: Running) -> None:
    for empty in ({"role": "assistant", "content": None}, {"role": "assistant"}):
        assert rendered(reader, [HISTORY[0], empty, HISTORY[0]]) == "<user>The dog<assistant><user>The dog<assistant>"
    assert "content: is missing" in refusal(running, [{"role": "user", "content": None}])


def test_options_of_the_template(reader: Running) -> None:
    assert rendered(reader, HISTORY[:1], chat_template_kwargs={"thinking": False}) == "<user>The dog quiet<assistant>"
    assert rendered(reader, HISTORY[:1], reasoning_effort="low") == "<user>The doglow<assistant>"
    assert rendered(reader, HISTORY[:1], add_generation_prompt=False) == "<user>The dog"
    begun = [HISTORY[0], {"role": "assistant", "content": "watched the"}]
    assert rendered(reader, begun, continue_final_message=True) == "<user>The dog<assistant>watched the"
    assert rendered(reader, begun) == "<user>The dog<assistant>watched the<assistant>"


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "tools", "messages", "conversation", "return_dict"])
def test_options_that_belong_to_the_server(reader: Running, name: str) -> None:
    assert f"{name} cannot be set there" in refusal(reader, HISTORY[:1], chat_template_kwargs={name: "{{ 1 }}"})


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyError, AttributeError, RecursionError, OverflowError])
def test_whatever_a_template_makes_of_options_is_the_request_s_own_mistake(
    reader: Running, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error("of its insides")

    monkeypatch.setattr(type(tokenizer()), "apply_chat_template", fail)
    told = refusal(reader, HISTORY[:1], chat_template_kwargs={"divisor": 0})
    assert told == "the model's chat template does not take these messages."


def test_deep_options(reader: Running) -> None:
    deep: Any = {}
    for _ in range(150):
        deep = {"a": deep}
    body = {"model": "needle", "messages": HISTORY[:1], "max_tokens": 1, "chat_template_kwargs": deep}
    assert reader.post("/v1/chat/completions", body).status_code in (200, 400)


def test_long_arguments_count_as_part_of_the_prompt(running: Running) -> None:
    call = CALL | {"function": {"name": "look", "arguments": "[" + "1," * 20_000 + "1]"}}
    assert "1000 are allowed" in refusal(running, [HISTORY[0], HISTORY[1] | {"tool_calls": [call]}])
