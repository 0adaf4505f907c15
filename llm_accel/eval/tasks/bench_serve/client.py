"""Sends a load to one server and times what comes back."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpx

from llm_accel.errors import ConfigError
from llm_accel.eval.tasks.bench_serve.load import Planned
from llm_accel.eval.tasks.bench_serve.settings import BenchServeSettings

OK = "ok"
_PATHS = {"completions": "completions", "chat": "chat/completions"}


@dataclass
class Timing:
    """What came of one request; times in seconds, from when it was due.

    Attributes:
        outcome: ``ok``, an HTTP status, or what broke.
        first: until the first piece of a stream; None: there was none.
        seconds: until its end.
        longest_gap: the longest wait between two pieces.
        prompt_tokens, new_tokens: as the server counts them, else 0 and the number of pieces.
        text: the answer.
    """

    outcome: str = OK
    first: float | None = None
    seconds: float = 0.0
    longest_gap: float = 0.0
    prompt_tokens: int = 0
    new_tokens: int = 0
    text: str = ""

    @property
    def between(self) -> float | None:
        """Mean time from token to token after the first one; None for answers of a token."""
        return (
            None if self.first is None or self.new_tokens < 2 else (self.seconds - self.first) / (self.new_tokens - 1)
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


class ServerClient:
    """An OpenAI-compatible server.

    Raises:
        ConfigError: it cannot be reached, or lists no model.
    """

    def __init__(self, url: str, settings: BenchServeSettings) -> None:
        self.url, self.settings = url, settings
        headers = {"Authorization": f"Bearer {os.environ.get('LLM_ACCEL_API_KEY', 'none')}"}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._client = httpx.AsyncClient(base_url=f"{url}/", headers=headers, timeout=settings.timeout, limits=limits)
        self.model = settings.model

    async def __aenter__(self) -> ServerClient:
        if self.model is None:
            self.model = await self._first_model()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._client.aclose()

    async def _first_model(self) -> str:
        try:
            answer = (await self.get("models")).json()
            name: str = answer["data"][0]["id"]
        except (httpx.HTTPError, LookupError, TypeError, ValueError) as error:
            why = f"{type(error).__name__}: {error}"
            raise ConfigError(
                f"--url {self.url}: GET {self.url}/models lists no model ({why}); give the address up to /v1 of a "
                "server that runs, or --model."
            ) from error
        return name

    async def get(self, path: str) -> httpx.Response:
        """The answer to GET; raises :class:`httpx.HTTPError` for one that is an error."""
        return (await self._client.get(path)).raise_for_status()

    async def run(self, load: Sequence[Planned], in_flight: int | None) -> tuple[list[Timing], float]:
        """Sends all requests, at most ``in_flight`` at a time; what came of each, and the seconds for all."""
        places = asyncio.Semaphore(in_flight or max(1, len(load)))
        begin = time.perf_counter()

        async def one(planned: Planned) -> Timing:
            if planned.at is not None:
                await asyncio.sleep(begin + planned.at - time.perf_counter())
            async with places:
                due = time.perf_counter() if planned.at is None else begin + planned.at
                return await self.send(planned.body, due)

        timings = await asyncio.gather(*map(one, load))
        return timings, time.perf_counter() - begin

    async def send(self, body: dict[str, Any], due: float) -> Timing:
        """One request to its end, streamed or not."""
        timing = Timing()
        try:
            request = {"model": self.model, **body}
            async with self._client.stream("POST", _PATHS[self.settings.endpoint], json=request) as response:
                if response.status_code != httpx.codes.OK:
                    await response.aread()
                    timing.outcome, timing.text = str(response.status_code), response.text
                elif body["stream"]:
                    await _read(response.aiter_lines(), timing, due)
                else:
                    _take_over(json.loads(await response.aread()), timing)
        except (httpx.HTTPError, ValueError) as error:
            timing.outcome = type(error).__name__
        timing.seconds = time.perf_counter() - due
        return timing


async def _read(lines: AsyncIterator[str], timing: Timing, due: float) -> None:
    """Fills ``timing`` from server-sent events."""
    pieces, latest, ended = 0, None, False
    async for line in lines:
        if not line.startswith("data:"):
            continue
        now, data = time.perf_counter() - due, line.removeprefix("data:").strip()
        if data == "[DONE]":
            ended = True
            continue
        event = json.loads(data)
        if "error" in event:
            timing.outcome, timing.text = "error in the stream", str(event["error"])
            return
        # not every server says [DONE]
        ended = ended or any(choice.get("finish_reason") for choice in event.get("choices", ()))
        if _take_over(event, timing):
            pieces += 1
            timing.first = now if timing.first is None else timing.first
            timing.longest_gap = max(timing.longest_gap, 0.0 if latest is None else now - latest)
            latest = now
    timing.new_tokens = timing.new_tokens or pieces
    if not ended:
        timing.outcome = "broken stream"


def _take_over(answer: dict[str, Any], timing: Timing) -> str:
    """Notes what an answer or an event of a stream says of tokens, and its text, which it returns."""
    usage = answer.get("usage") or {}
    timing.prompt_tokens = usage.get("prompt_tokens", timing.prompt_tokens)
    timing.new_tokens = usage.get("completion_tokens", timing.new_tokens)
    text = "".join(map(_text, answer.get("choices", ())))
    timing.text += text
    return text


def _text(choice: dict[str, Any]) -> str:
    said = choice.get("delta") or choice.get("message") or {}
    return choice.get("text") or said.get("content") or ""
