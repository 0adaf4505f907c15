"""The requests of a load: the same ones, at the same times, for every server."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from llm_accel.eval.prompts.words import SINGLE
from llm_accel.eval.tasks.bench_serve.settings import BenchServeSettings, weighted


@dataclass(frozen=True)
class Planned:
    """One request.

    Attributes:
        at: seconds after the start at which it is sent; None: as soon as there is a place.
        body: what is sent, apart from the model's name.
    """

    at: float | None
    body: dict[str, Any]


def make_load(settings: BenchServeSettings) -> list[Planned]:
    """The requests in the order in which they are sent."""
    rng = random.Random(settings.seed)
    shared = rng.choices(SINGLE, k=settings.shared_words)
    words, tokens = (_draw(rng, mix, settings.requests) for mix in (settings.prompt_words, settings.new_tokens))
    times: Sequence[float | None] = [None] * settings.requests
    if settings.rate is not None:
        times = list(accumulate(rng.expovariate(settings.rate) for _ in range(settings.requests)))
    return [
        Planned(at, _body(settings, " ".join([*shared, *rng.choices(SINGLE, k=length - len(shared))]), most))
        for at, length, most in zip(times, words, tokens, strict=True)
    ]


def _draw(rng: random.Random, mix: Sequence[str], count: int) -> list[int]:
    """Numbers in exactly the shares of their weights, up to rounding, in random order."""
    pattern = [number for number, weight in weighted(mix) for _ in range(weight)]
    drawn = [pattern[place % len(pattern)] for place in range(count)]
    rng.shuffle(drawn)
    return drawn


def _body(settings: BenchServeSettings, prompt: str, new_tokens: int) -> dict[str, Any]:
    chat = settings.endpoint == "chat"
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    return asked | {"max_tokens": new_tokens, "temperature": 0.0} | streamed | settings.fields
