"""Settings of ``llm-accel bench serve``."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llm_accel.common.options import Options, option
from llm_accel.errors import ConfigError

ENDPOINTS = ("completions", "chat")
DEFAULT_IN_FLIGHT = 8

_URL = re.compile(r"(?:([\w.-]+)=)?(https?://\S+?)/?")
_MIX = re.compile(r"([1-9]\d*)(?::([1-9]\d*))?")


def parse_servers(texts: Sequence[str]) -> tuple[str, ...]:
    """``name=http://host:port/v1`` of each server; one without a name is called by its address."""
    found = {}
    for text in texts:
        match = _URL.fullmatch(text.strip())
        if match is None:
            raise ConfigError(f"--url {text!r}: give an address such as http://127.0.0.1:8000/v1, or ours=http://...")
        name = match[1] or match[2].split("//")[1]
        if name in found:
            raise ConfigError(f"--url {text!r}: there are two servers called {name!r}; put another name in front.")
        found[name] = f"{name}={match[2]}"
    return tuple(found.values())


def parse_mix(text: str) -> tuple[str, ...]:
    """``16:3,192:1``: three times as many of 16 as of 192. Each number and its weight."""
    parts = [_MIX.fullmatch(part.strip()) for part in text.split(",")]
    if None in parts:
        raise ConfigError(f"{text!r}: give numbers, each with a weight if you like, for example 16:3,192:1.")
    return tuple(f"{part[1]}:{part[2] or 1}" for part in parts if part is not None)


def parse_body(text: str) -> str:
    """A JSON object."""
    try:
        given = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--body {text!r} is no JSON ({error}).") from error
    if not isinstance(given, dict):
        raise ConfigError(f"--body {text!r}: give a JSON object, for example '{{\"temperature\": 0.7}}'.")
    return text


@dataclass(frozen=True, kw_only=True)
class BenchServeSettings(Options):
    """The servers and the load that each of them gets."""

    servers: tuple[str, ...] = option(
        "repeatable; an OpenAI-compatible API, as http://127.0.0.1:8000/v1 or with a name for the table in front, as "
        "ours=http://...; its key in LLM_ACCEL_API_KEY",
        (),
        flag="--url",
        metavar="[NAME=]URL",
        parse=parse_servers,
        shown="",
        repeated=True,
    )
    model: str | None = option("name of the model (default: the first that the server lists)", None, metavar="NAME")
    requests: int = option("requests in all", 48, least=1, group="load")
    in_flight: int | None = option(
        f"closed loop: as many are open at any time (default: {DEFAULT_IN_FLIGHT}, unless --rate is given)",
        None,
        least=1,
        group="load",
    )
    rate: float | None = option(
        "open loop: requests per second, with exponential times between them, whether or not earlier ones have ended",
        None,
        least=0.001,
        metavar="R",
        group="load",
    )
    prompt_words: tuple[str, ...] = option(
        "length of the prompts, a common word each, some with a weight behind a colon",
        ("128:1", "512:1"),
        metavar="N[:W],...",
        parse=parse_mix,
        shown="128,512",
        group="load",
    )
    shared_words: int = option("of them the first ones, the same in all prompts", 0, least=0, group="load")
    new_tokens: tuple[str, ...] = option(
        "most tokens of the answers, some with a weight behind a colon",
        ("16:3", "192:1"),
        metavar="N[:W],...",
        parse=parse_mix,
        shown="16:3,192:1",
        group="load",
    )
    endpoint: str = option("what is called", "completions", choices=ENDPOINTS, group="load")
    body: str = option(
        "fields for every request, for example '{\"ignore_eos\": true}'",
        "{}",
        metavar="JSON",
        parse=parse_body,
        group="load",
    )
    seed: int = option("of lengths, words and times", 0, group="load")
    warmup: int = option("requests before the clock runs, one after the other", 2, least=0, group="run")
    rounds: int = option("times that every server gets the load, in turn", 1, least=1, group="run")
    timeout: float = option("seconds after which a request counts as failed", 600.0, least=1, metavar="S", group="run")

    def validate(self) -> None:
        if not self.servers:
            raise ConfigError("no server is given; start one and give its address, as --url http://127.0.0.1:8000/v1.")
        if self.rate is not None and self.in_flight is not None:
            raise ConfigError("--rate sends without waiting for answers and --in-flight waits for them; give one.")
        shortest = min(number for number, _ in weighted(self.prompt_words))
        if self.shared_words > shortest:
            raise ConfigError(f"--shared-words {self.shared_words}: the shortest prompt has only {shortest} words.")
        if self.rate is None:
            self.resolve(in_flight=DEFAULT_IN_FLIGHT)

    @property
    def addresses(self) -> dict[str, str]:
        """Address of each server by its name."""
        return dict(server.split("=", 1) for server in self.servers)

    @property
    def fields(self) -> dict[str, Any]:
        """``body`` as an object."""
        fields: dict[str, Any] = json.loads(self.body)
        return fields


def weighted(mix: Sequence[str]) -> list[tuple[int, int]]:
    """Numbers and weights of :func:`parse_mix`."""
    return [(int(number), int(weight)) for number, weight in (part.split(":") for part in mix)]
