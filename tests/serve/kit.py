"""A server in a thread whose model can be held, slowed and broken from outside."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai

from llm_accel.serve.loading import Served
from llm_accel.serve.server import Server, bind
from llm_accel.serve.settings import ServeSettings

ALICE, BOB = "key-of-alice", "key-of-bob--"
PATIENCE = 120.0  # seconds that something which must happen may take on a busy machine


@dataclass
class Brake:
    """Runs before every forward pass of the model.

    Attributes:
        permits: forward passes that may still run; None for any number.
        error: raised once by the next forward pass.
    """

    permits: int | None = None
    error: Exception | None = None
    changed: threading.Condition = field(default_factory=threading.Condition)

    def __call__(self, *_: Any) -> None:
        error, self.error = self.error, None
        if error is not None:
            raise error
        with self.changed:
            assert self.changed.wait_for(lambda: self.permits is None or self.permits > 0, PATIENCE)
            if self.permits is not None:
                self.permits -= 1

    def set(self, permits: int | None) -> None:
        with self.changed:
            self.permits = permits
            self.changed.notify_all()


@dataclass
class Running:
    """A server that runs, and what a test needs to talk to it."""

    server: Server
    port: int
    brake: Brake
    thread: threading.Thread
    http: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=PATIENCE))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str = ALICE) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, http_client=self.http)

    def post(self, path: str, body: Any, key: str = ALICE, **options: Any) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"} | options.pop("headers", {})
        return self.http.post(self.url + path, content=content, headers=headers, **options)

    def complete(self, prompt: Any = "The dog", key: str = ALICE, **fields: Any) -> httpx.Response:
        return self.post("/v1/completions", {"model": "needle", "prompt": prompt, "max_tokens": 4} | fields, key)

    def metrics(self) -> dict[str, float]:
        page = self.http.get(f"{self.url}/metrics", headers={"Authorization": f"Bearer {ALICE}"}).text
        lines = (line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in lines}

    def outcomes(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, value in self.metrics().items():
            if name.startswith("llm_accel_requests_total{"):
                outcome = name.split('outcome="')[1].split('"')[0]
                found[outcome] = found.get(outcome, 0) + value
        return found

    @contextmanager
    def held(self, permits: int = 0) -> Iterator[None]:
        """After so many more forward passes the model waits until the end of the block."""
        self.brake.set(permits)
        try:
            yield
        finally:
            self.brake.set(None)

    def busy(self) -> bool:
        return bool(self.server.engine.running)

    def idle(self) -> None:
        wait_for(lambda: not self.busy() and len(self.server.engine.scheduler) == 0)

    def stop(self) -> None:
        self.http.close()
        self.server.should_exit = True
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(model: Any, tokenizer: Any, processor: Any = None, **options: Any) -> Running:
    """A server on a free port; the brake goes onto the model."""
    brake = Brake()
    model.register_forward_pre_hook(brake)
    server = Server(Served(model, tokenizer, processor, "needle"), ServeSettings(port=0, **options))
    listener = bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    running = Running(server, listener.getsockname()[1], brake, thread)
    wait_for(lambda: server.started)
    return running
