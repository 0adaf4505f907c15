"""What is refused before it costs anything, what reading a prompt may take, and what counts against health."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from llm_accel import ConfigError, UnknownMethodError
from llm_accel.serve.settings import ServeSettings
from tests.eval.needle_helpers import tiny_model, tokenizer
from tests.serve.kit import Running, start, wait_for


class Slow:
    """A tokenizer that waits before it reads a text which begins with "slow"; the server's copy of it is itself."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.go, self.texts = inner, threading.Event(), []

    def __deepcopy__(self, memo: Any) -> Slow:
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, text: str, **options: Any) -> Any:
        self.texts.append(text)
        if text.startswith("slow"):
            assert self.go.wait(60)
        return self.inner(text, **options)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Running, Slow]]:
    slow = Slow(tokenizer())
    running = start(
        tiny_model(),
        slow,
        method="snapkv:budget=64",
        allow_methods="h2o",
        max_new_tokens=4,
        max_queue=3,
        max_batch=2,
        max_prompt_tokens=50,
    )
    yield running, slow
    running.stop()


def refusal(response: httpx.Response, status: int = 400) -> str:
    assert response.status_code == status, response.text
    return str(response.json()["error"]["message"])


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"n": 1025}, "1025 answers in one request; 1024 are allowed"),
        ({"n": 10**12}, "1000000000000 answers in one request; 1024 are allowed"),
        ({"n": 513, "prompt": ["slow", "slow"]}, "1026 answers in one request"),
        ({"prompt": ["slow"] * 5000}, "5000 answers in one request"),
        ({"max_tokens": 5}, "max_tokens=5: at most 4"),
        ({"min_tokens": 5}, "max_tokens=5: at most 4"),
        ({"max_tokens": 0}, "max_tokens: give at least 1"),
        ({"logit_bias": {"99999": 1}}, "logit_bias: token ids are below"),
        ({"prompt": "slow " * 200}, "1000 characters, which is over 16 for each token that may be; 50 are allowed"),
        ({"prompt": [1] * 51}, "51 tokens; 50 are allowed"),
        ({"prompt": [[1], [1] * 51]}, "51 tokens; 50 are allowed"),
        ({"prompt": [10**18]}, "token ids are below"),
        ({"prompt": "slow", "llm_accel": {"method": "snapvk"}}, "Did you mean 'snapkv'?"),
        ({"prompt": "slow", "llm_accel": {"method": "snapkv:kernel=1000000001"}}, "kernel=1000000001"),
        (
            {"prompt": "slow", "llm_accel": {"method": "dense:capacity=1025"}},
            "capacity=1025; the model's context of 1024",
        ),
        ({"prompt": "slow", "llm_accel": {"method": "random"}}, "random cannot be chosen by requests to this server"),
        ({"prompt": "slow", "llm_accel": {"method": "fastv+snapkv"}}, "fastv cannot be chosen"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_costs_nothing_to_refuse_is_refused_unread(
    server: tuple[Running, Slow], fields: dict[str, Any], says: str
) -> None:
    running, slow = server
    before = len(slow.texts)
    assert says in refusal(running.complete(**fields))
    assert len(slow.texts) == before


def test_long_chats_are_refused_unread(server: tuple[Running, Slow]) -> None:
    running, slow = server
    before = len(slow.texts)
    messages = [{"role": "user", "content": [{"type": "text", "text": "slow "}] * 40}] * 5
    assert "1000 characters" in refusal(running.post("/v1/chat/completions", {"model": "needle", "messages": messages}))
    assert len(slow.texts) == before


def test_requests_may_use_what_the_operator_allows(server: tuple[Running, Slow]) -> None:
    running, _ = server
    for method in ("dense", "dense:capacity=512", "snapkv:budget=40", "h2o:budget=40"):
        assert running.complete(llm_accel={"method": method}).status_code == 200
    said = refusal(running.complete(llm_accel={"method": "streaming_llm"}))
    assert "dense, h2o, snapkv" in said and "--allow-methods" in said


def test_allowed_methods_are_checked_before_anything_is_loaded() -> None:
    assert ServeSettings(method="flowcut+snapkv").allowed() == {"dense", "flowcut", "snapkv"}
    assert ServeSettings(allow_methods=" h2o, random ").allowed() == {"dense", "h2o", "random"}
    assert ServeSettings(allow_methods="all").allowed() >= {"dense", "hip", "vasparse"}
    with pytest.raises(ConfigError, match=r"--allow-methods: .*'h20'.*Did you mean 'h2o'"):
        ServeSettings(allow_methods="snapkv,h20")
    with pytest.raises(UnknownMethodError, match="Did you mean 'snapkv'"):
        ServeSettings(method="snapvk")


def test_reading_takes_places_in_the_queue_and_time_of_the_deadline(server: tuple[Running, Slow]) -> None:
    running, slow = server
    slow.go.clear()
    before = len(slow.texts)
    with ThreadPoolExecutor(4) as pool:
        try:
            first = pool.submit(running.complete, "slow", llm_accel={"deadline_s": 0.4})
            wait_for(lambda: len(slow.texts) == before + 1)  # the one thread that reads is busy
            others = [pool.submit(running.complete, "The dog") for _ in range(2)]
            wait_for(lambda: running.server.engine.scheduler._reading == 3)
            full = running.complete("The dog")
            assert full.status_code == 429 and int(full.headers["Retry-After"]) >= 1
            assert refusal(first.result(), 504) == "not finished within 0.4 s."
            late = running.complete("The dog", llm_accel={"deadline_s": 0.1})  # its place is free again
            assert refusal(late, 504) == "not finished within 0.1 s."
        finally:
            slow.go.set()
        assert [one.result().status_code for one in others] == [200, 200]
    running.idle()
    assert running.server.engine.scheduler._reading == 0
    assert len(slow.texts) == before + 3, "what was given up before it was read is not read"


def test_failures_of_methods_that_clients_chose_do_not_count_against_health(server: tuple[Running, Slow]) -> None:
    running, _ = server

    def fail(method: str) -> int:
        running.brake.error = RuntimeError("as if the option did it")
        return running.complete(llm_accel={"method": method}).status_code

    assert [fail("snapkv:budget=40") for _ in range(4)] == [500] * 4
    running.idle()
    assert running.http.get(f"{running.url}/health").status_code == 200
    assert [fail("snapkv:budget=64") for _ in range(3)] == [500] * 3
    running.idle()
    assert running.http.get(f"{running.url}/health").json() == {"status": "failing"}
    assert running.complete().status_code == 200
    running.idle()
    assert running.http.get(f"{running.url}/health").json() == {"status": "ok"}
