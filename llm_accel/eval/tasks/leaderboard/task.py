"""RULER's tasks for every method at every share of the cache, the question before and after compression."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_accel.common.statistics import wilson
from llm_accel.eval.engine import TextEngine, TextOutcome
from llm_accel.eval.grid import GridPoint
from llm_accel.eval.plots import save
from llm_accel.eval.prompts.maker import PromptMaker, TextPrompt
from llm_accel.eval.records import Record
from llm_accel.eval.summary import DENSE, by_method, progress_of
from llm_accel.eval.tasks.leaderboard.curves import draw
from llm_accel.eval.tasks.leaderboard.entries import FLOORS, entries
from llm_accel.eval.tasks.leaderboard.settings import LeaderboardSettings
from llm_accel.eval.tasks.leaderboard.table import tables
from llm_accel.eval.tasks.ruler.task import RulerTask
from llm_accel.methods import MethodConfig

WAYS = {False: "query-aware", True: "query-agnostic"}


@dataclass(frozen=True, order=True)
class BoardPoint(GridPoint):
    """A prompt of RULER in one of the two ways; its ids are the same in both."""

    query_agnostic: bool

    @property
    def key(self) -> tuple[Any, ...]:
        """The values that identify its records."""
        return (*super().key, self.query_agnostic)


class LeaderboardTask(RulerTask):
    """RULER's grid twice, with a row of the board for each method and share."""

    command = "leaderboard"
    fields = ("method", "length", "task", "sample", "query_agnostic")
    plots = ("curves.png",)
    settings: LeaderboardSettings

    def __init__(
        self, model: Any, tokenizer: Any, maker: PromptMaker, palette: str = "classic", shared_prefill: bool = True
    ) -> None:
        super().__init__(model, tokenizer, maker, palette)
        settings = self.settings
        self.engines = {way: TextEngine(model, tokenizer, way, shared=shared_prefill) for way in settings.ways}
        tokens = sorted({self.size(GridPoint(length, row, 0)) for length in settings.lengths for row in settings.rows})
        self.entries, self.left_out = entries(settings.methods, settings.ratios, tokens, self.engine.try_method)
        placed = {name: entry.at(tokens[0]) for name, entry in self.entries.items()}
        self.configs = {DENSE: (), **{name: (config,) for name, config in placed.items()}}
        self._placed = {placed[name]: entry for name, entry in self.entries.items()}

    @property
    def wanted(self) -> int:
        return len(self.configs) * len(self.items())

    def warnings(self) -> list[str]:
        """Also what is not on the board."""
        return [*super().warnings(), *(f"left out: {name}: {reason}" for name, reason in self.left_out.items())]

    def items(self) -> Sequence[GridPoint]:
        """Every cell and sample in both ways."""
        return [BoardPoint(p.length, p.row, p.sample, way) for p in super().items() for way in self.settings.ways]

    def agnostic(self, point: GridPoint) -> bool:
        assert isinstance(point, BoardPoint)
        return point.query_agnostic

    def alike(self, point: GridPoint) -> Any:
        return super().alike(point), self.agnostic(point)

    def answer(self, prompts: Sequence[TextPrompt], configs: Sequence[MethodConfig]) -> TextOutcome:
        """Methods are fitted to the length of the prompts and to where their question stands."""
        later = self.agnostic(prompts[0].point)
        fitted = [self._placed[config].at(len(prompts[0].ids), later) for config in configs]
        return self.engines[later].run(prompts, fitted)

    def column(self, records: Sequence[Record]) -> dict[str, Any]:
        return {**super().column(records), "ci95": _score(records)["ci95"], **prompt_bytes(records)}

    def summarize(self, records: Sequence[Record], **about: Any) -> dict[str, Any]:
        """Both ways with a row for each method and share: score, interval, bytes held, groups of tasks, lengths."""
        settings = self.settings
        ways = {WAYS[way]: self._rows([r for r in records if r["query_agnostic"] is way]) for way in settings.ways}
        board = {"lengths": settings.lengths, "ratios": settings.ratios, "samples": settings.samples}
        facts = {**board, "seed": settings.seed, **self.facts(next(iter(ways.values()))), "left_out": self.left_out}
        return {**about, **facts, **progress_of(records, self.wanted), "ways": ways}

    def _rows(self, records: Sequence[Record]) -> dict[str, Any]:
        rows = by_method(tuple(self.configs), self.settings.lengths, records, self.column, self.measures)
        for name, row in rows.items():
            own, entry = [record for record in records if record["method"] == name], self.entries.get(name)
            groups = {group: [r for r in own if group_of(r["task"]) == group] for group in self.groups}
            row |= {
                "entry": None if entry is None else entry.method.spec(),
                "ratio": 1.0 if entry is None else entry.ratio,
                "floor": entry is not None and entry.method.name in FLOORS,
                "ci95": _score(own)["ci95"],
                **prompt_bytes(own),
                "groups": {group: _score(part) for group, part in groups.items() if part},
            }
        return rows

    @property
    def groups(self) -> Iterable[str]:
        """Groups of the tasks that run."""
        return dict.fromkeys(map(group_of, self.settings.tasks))

    @property
    def aware(self) -> str:
        return " and ".join(WAYS[way] for way in self.settings.ways)

    def render(self, summary: dict[str, Any]) -> str:
        """The title, and the tables as Markdown."""
        return f"{self.title()}\n\n{tables(summary)}"

    def draw(self, summary: dict[str, Any], records: Sequence[Record], folder: Path) -> None:
        save(folder / self.plots[0], draw(summary, self.title()))


def group_of(task: str) -> str:
    """Tasks that differ by their number only are a group: ``niah_multikey_2`` is in ``niah_multikey``."""
    return re.sub(r"_\d+$", "", task)


def prompt_bytes(records: Sequence[Record]) -> dict[str, Any]:
    """KV bytes per prompt when the answer begins, with the share of what dense holds then; later ones depend on how
    long the answer is. Of the dense model, which is not asked, None."""
    known = [record for record in records if record["prompt_kv_bytes"] is not None]
    if not known:
        return {"prompt_kv_bytes": None, "held": None}
    held, dense = (sum(record[key] for record in known) for key in ("prompt_kv_bytes", "prompt_dense_kv_bytes"))
    return {"prompt_kv_bytes": round(held / len(known)), "held": round(held / dense, 4)}


def _score(records: Sequence[Record]) -> dict[str, Any]:
    """Mean and Wilson interval. A score between 0 and 1 varies less than a hit or miss of the same mean, so that the
    interval is then wider than need be."""
    total, n = sum(record["score"] for record in records), len(records)
    return {"n": n, "score": round(total / n, 4) if n else None, "ci95": [round(end, 4) for end in wilson(total, n)]}
