"""The points of a grid of prompts, their batches, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any


@dataclass(frozen=True, order=True)
class GridPoint:
    """One prompt of a grid; ordered by length first, so that cheap prompts come first."""

    length: int  # of the prompt in tokens, as asked for
    row: Any  # depth of the needle in percent, or name of a task
    sample: int  # number of the prompt in its cell

    @property
    def key(self) -> tuple[Any, ...]:
        """The values that identify its records."""
        return self.length, self.row, self.sample


def points(lengths: Iterable[int], rows: Iterable[Any], samples: int) -> list[GridPoint]:
    """All points, ascending."""
    rows = tuple(rows)
    return sorted(GridPoint(length, row, sample) for length in lengths for row in rows for sample in range(samples))


def batches(wanted: Iterable[GridPoint], size: int, alike: Callable[[GridPoint], Any]) -> Iterator[Sequence[GridPoint]]:
    """Points with equal ``alike(point)``, at most ``size`` at a time."""
    for _, group in groupby(sorted(wanted, key=lambda point: (alike(point), point)), key=alike):
        yield from chunks(list(group), size)


def chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """At most ``size`` items at a time."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


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


def cost(pending: Sequence[tuple[GridPoint, int, int, int]], speed: Speed) -> str:
    """The amount of work, in words; ``pending``: points with the tokens of their prompt, the tokens to generate at
    most, and the number of methods that lack them."""
    cells = len({(point.length, point.row) for point, *_ in pending})
    prompts, new_tokens = sum(n for *_, n in pending), sum(new * n for _, _, new, n in pending)
    tokens = sum(length * n for _, length, _, n in pending)
    seconds = sum(n * speed.seconds(length, new) for _, length, new, n in pending)
    return (
        f"{cells} cells, {prompts} prompts, {tokens:,} prompt tokens, at most {new_tokens:,} new tokens; about "
        f"{duration(seconds)} at the dense model's speed"
    )


def duration(seconds: float) -> str:
    """``45 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = max(1, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
