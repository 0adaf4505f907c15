"""The places of a run (length, depth, sample), their shards, batches and cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from llm_accel.eval.tasks.needle.settings import Settings


@dataclass(frozen=True, order=True)
class Place:
    """One prompt of the grid; ordered by length first, so that cheap prompts come first."""

    length: int
    depth: float
    sample: int


def places(settings: Settings, shard: tuple[int, int] = (1, 1)) -> list[Place]:
    """All places of a shard, ascending. Shards are disjoint, cover the grid and have equal shares of every length."""
    every = sorted(
        Place(length, depth, sample)
        for length in settings.lengths
        for depth in settings.depths
        for sample in range(settings.samples)
    )
    index, count = shard
    return every[index - 1 :: count]


def batches(wanted: Iterable[Place], size: int) -> Iterator[list[Place]]:
    """Places of one length, at most ``size`` at a time. Lengths are exact, so a batch needs no padding."""
    for _, group in groupby(sorted(wanted), key=lambda place: place.length):
        row = list(group)
        for start in range(0, len(row), size):
            yield row[start : start + size]


@dataclass(frozen=True)
class Cost:
    """What a run takes.

    Attributes:
        cells: (length, depth) pairs.
        prompts: prompts over all methods.
        prompt_tokens: tokens to prefill over all methods.
        new_tokens: tokens to generate at most.
        seconds: estimate, or None.
    """

    cells: int
    prompts: int
    prompt_tokens: int
    new_tokens: int
    seconds: float | None = None

    def __str__(self) -> str:
        text = (
            f"{self.cells} cells, {self.prompts} prompts, {self.prompt_tokens:,} prompt tokens, "
            f"at most {self.new_tokens:,} new tokens"
        )
        return text if self.seconds is None else f"{text}; about {duration(self.seconds)} at the dense model's speed"


@dataclass(frozen=True)
class Speed:
    """Seconds of a prefill as ``linear * tokens + square * tokens**2``, and of one decode step."""

    linear: float
    square: float
    step: float

    @staticmethod
    def fit(first: tuple[int, float], second: tuple[int, float] | None, step: float) -> Speed:
        """From one or two measured (tokens, seconds); one alone gives a linear model, a lower bound."""
        if second is None or second[0] <= first[0]:
            return Speed(first[1] / first[0], 0.0, step)
        (n, t), (m, u) = first, second
        square = max(0.0, (u / m - t / n) / (m - n))
        return Speed(max(0.0, t / n - square * n), square, step)

    def seconds(self, length: int, new_tokens: int) -> float:
        """Estimate for one prompt."""
        return self.linear * length + self.square * length**2 + self.step * new_tokens


def cost(pending: Iterable[tuple[Place, int]], new_tokens: int, speed: Speed | None = None) -> Cost:
    """Cost of the places still to run, each with the number of methods that lack it."""
    todo = [(place, methods) for place, methods in pending if methods]
    seconds = None if speed is None else sum(n * speed.seconds(place.length, new_tokens) for place, n in todo)
    return Cost(
        cells=len({(place.length, place.depth) for place, _ in todo}),
        prompts=sum(n for _, n in todo),
        prompt_tokens=sum(n * place.length for place, n in todo),
        new_tokens=sum(n * new_tokens for _, n in todo),
        seconds=seconds,
    )


def duration(seconds: float) -> str:
    """``45 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = max(1, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
