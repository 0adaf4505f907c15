"""Bars on stderr: plain, and with the running mean of each method."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, TypeVar

Record = Mapping[str, Any]
Item = TypeVar("Item")


def bar(total: int | None, unit: str, shown: bool = True) -> Any:
    """A progress bar on stderr; ``total`` None: unknown."""
    tqdm: Any = importlib.import_module("tqdm").tqdm
    return tqdm(
        total=total,
        disable=not shown,
        unit=unit,
        unit_scale=True,
        file=sys.stderr,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 20.0,
    )


def iterate(items: Iterable[Item], unit: str, total: int | None = None) -> Iterator[Item]:
    """The items, with a bar on stderr that counts them; ``total``: how many there are, where they have no length."""
    with bar(len(items) if total is None and isinstance(items, Sized) else total, unit) as counter:
        for item in items:
            yield item
            counter.update(1)


class RunProgress:
    """Counts what takes time (tokens, prompts) up to ``total``; ``done``: records of an earlier run; ``shown``: of
    several processes one is enough; ``score``: the field whose mean is shown."""

    def __init__(self, total: int, done: Sequence[Record], unit: str, shown: bool = True, score: str = "exact") -> None:
        self._score = score
        self._scores: dict[str, list[float]] = {}
        for record in done:
            self._scores.setdefault(record["method"], []).append(record[score])
        self._bar = bar(total, unit, shown)
        self._shown = 0.0

    def add(self, records: Sequence[Record], amount: int) -> None:
        """Counts the records of a batch."""
        for record in records:
            self._scores.setdefault(record["method"], []).append(record[self._score])
        if time.monotonic() - self._shown > 0.5:
            short = [name.partition(":")[0] for name in self._scores]
            names = short if len(set(short)) == len(short) else list(self._scores)
            means = [f"{name} {sum(s) / len(s):.2f}" for name, s in zip(names, self._scores.values(), strict=True)]
            self._bar.set_postfix_str(", ".join(means), refresh=False)
            self._shown = time.monotonic()
        self._bar.update(amount)

    def __enter__(self) -> RunProgress:
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()
