"""What the server does not take: each refusal has its status, says why, and harms nobody else."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from llm_accel import ConfigError, cli
from llm_accel.serve.settings import KEY_VARIABLE, ServeSettings
from tests.serve.kit import Running

CHAT: dict[str, Any] = {"model": "needle", "messages": [{"role": "user", "content": "The dog"}], "max_tokens": 2}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
LONE = b'{"model": "needle", "prompt": "\\ud800", "max_tokens": 2}'


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "JSON"),
        (b"[" * 50_000, "JSON"),
        (b"\xff\xfe", "JSON"),
        (b"[]", "object"),
        (LONE, "JSON"),
        (CHAT | {"messages": []}, "messages"),
        (CHAT | {"messages": [{"role": "wizard", "content": "x"}]}, "role"),
        (CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "content"),
        (CHAT | {"messages": [{"role": "user", "content": [IMAGE]}]}, "text only"),
        (CHAT | {"temperature": "hot"}, "temperature"),
        (CHAT | {"temperature": 2.5}, "temperature"),
        (CHAT | {"max_tokens": True}, "max_tokens"),
        (CHAT | {"max_tokens": 65}, "at most 64"),
        (CHAT | {"n": 1025}, "1024 are allowed"),
        (CHAT | {"top_p": 0}, "top_p"),
        (CHAT | {"stop": [""]}, "stop"),
        (CHAT | {"best_of": 2}, "best_of: unknown, or not supported"),
        (CHAT | {"tools": [{"type": "function"}]}, "tools"),
        (CHAT | {"messages": [{"role": "user", "content": "word " * 9000}]}, "1000 are allowed"),
        (CHAT | {"llm_accel": {"method": "snapvk"}}, "Did you mean 'snapkv'?"),
        (CHAT | {"llm_accel": {"method": "snapkv:budget=0"}}, "budget"),
        (CHAT | {"llm_accel": {"method": "retrieval_heads:heads=/etc/passwd"}}, "operator"),
        (CHAT | {"llm_accel": {"method": "fastv"}}, "fastv"),
        (CHAT | {"llm_accel": {"session": "s"}, "n": 2}, "n=1"),
    ],
    ids=lambda value: value[:20].decode("latin-1") if isinstance(value, bytes) else str(value)[-40:],
)
def test_bad_requests(running: Running, body: Any, says: str) -> None:
    response = running.post("/v1/chat/completions" if body is not LONE else "/v1/completions", body)
    assert response.status_code == 400 and says in response.json()["error"]["message"], response.text


def test_values_that_ask_for_nothing_are_taken(running: Running) -> None:
    neutral = {"frequency_penalty": 0, "tools": None, "response_format": {"type": "text"}, "user": "u", "stop": None}
    assert running.post("/v1/chat/completions", CHAT | neutral).status_code == 200


def test_clients_see_the_errors_of_openai(running: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="this server runs 'needle'"):
        running.client().completions.create(model="gpt", prompt="x")
    with pytest.raises(openai.AuthenticationError, match="valid key"):
        running.client("key-of-mallory").models.list()
    with pytest.raises(openai.BadRequestError, match="temperature"):
        running.client().completions.create(model="needle", prompt="x", temperature=-1)


@pytest.mark.parametrize("header", [None, "", "key-of-alice", "Basic key-of-alice", "Bearer", "Bearer key-of-alic"])
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/nowhere"])
def test_every_page_but_health_needs_a_key(running: Running, path: str, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    response = running.http.get(running.url + path, headers=headers)
    assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
    assert running.http.get(f"{running.url}/health").json() == {"status": "ok"}


def test_large_bodies_are_refused_with_and_without_a_length(running: Running) -> None:
    body = json.dumps(CHAT | {"user": "x" * 200_000}).encode()
    assert running.post("/v1/chat/completions", body).status_code == 413
    headers = {"Authorization": "Bearer key-of-alice", "Content-Type": "application/json"}
    halves = iter([body[:60_000], body[60_000:]])
    response = running.http.post(f"{running.url}/v1/chat/completions", content=halves, headers=headers)
    assert response.status_code == 413


def test_other_paths_methods_and_content_types(running: Running) -> None:
    headers = {"Authorization": "Bearer key-of-alice"}
    assert running.http.get(f"{running.url}/v1/embeddings", headers=headers).status_code == 404
    assert running.http.get(f"{running.url}/v1/completions", headers=headers).status_code == 405
    text = running.post("/v1/chat/completions", CHAT, headers={"Content-Type": "text/plain"})
    assert text.status_code == 400 and "application/json" in text.text


def test_open_addresses_need_a_key(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert ServeSettings().keys() == () == ServeSettings(host="::1").keys()
    assert cli.main(["serve", "--host", "0.0.0.0"]) == cli.USAGE_ERROR
    assert KEY_VARIABLE in capsys.readouterr().err
    monkeypatch.setenv(KEY_VARIABLE, "short")
    with pytest.raises(ConfigError, match="8 characters"):
        ServeSettings().keys()
    monkeypatch.setenv(KEY_VARIABLE, "long-enough")
    assert ServeSettings(host="0.0.0.0").keys() == ("long-enough",)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--method", "snapvk"], "snapkv"),
        (["--max-batch", "0"], "--max-batch"),
        (["--port", "99999"], "--port"),
        (["--dtype", "float12"], "--dtype"),
        (["--api-key-file", "/nowhere"], "--api-key-file"),
        (["--model", "./nowhere"], "no such folder"),
    ],
)
def test_wrong_arguments_end_with_code_2(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", *arguments]) == cli.USAGE_ERROR
    assert says in capsys.readouterr().err
