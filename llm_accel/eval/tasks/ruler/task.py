"""The RULER task (Hsieh et al. 2024, arXiv 2404.06654): thirteen kinds of prompts at exact lengths."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from llm_accel.eval.grid import GridPoint
from llm_accel.eval.lengths import length_label
from llm_accel.eval.prompts.maker import PromptMaker, TextPrompt
from llm_accel.eval.prompts.needles import NeedleBuilder
from llm_accel.eval.prompts.template import Builder, PromptTemplate
from llm_accel.eval.prompts.words import read_words
from llm_accel.eval.records import Record
from llm_accel.eval.summary import DENSE, mean_of
from llm_accel.eval.table import aligned, by_length, missing, number, void
from llm_accel.eval.tasks.ruler.chains import ChainBuilder
from llm_accel.eval.tasks.ruler.documents import load_questions
from llm_accel.eval.tasks.ruler.lists import CodedBuilder, ListBuilder
from llm_accel.eval.tasks.ruler.settings import RulerSettings
from llm_accel.eval.tasks.ruler.tasks import QA, TASKS, TaskSpec
from llm_accel.eval.text_task import TextTask

VOID = 0.5  # a task that the dense model solves less than half of says nothing about a method


@dataclass(frozen=True)
class RulerMaker(PromptMaker):
    """Prompts of the tasks; ``length`` is that of prompt and answer together."""

    settings: RulerSettings

    def template(self, point: GridPoint) -> PromptTemplate:
        rng = random.Random(f"ruler/{self.settings.seed}/{point.row}/{point.length}/{point.sample}")
        return self.builders[point.row].draw(rng, point.sample, point.length)

    def new_tokens(self, point: GridPoint) -> int:
        return TASKS[point.row].new_tokens

    def length(self, point: GridPoint) -> int:
        return point.length - self.new_tokens(point)

    def tried_samples(self, row: str) -> int:
        return self.settings.samples if row in QA else 1  # the documents of a question may be longer than the others'

    @cached_property
    def builders(self) -> dict[str, Builder]:
        """What draws the prompts of each task. Raises :class:`ConfigError`: the questions of a task, or the words for
        lists, cannot be read."""
        return {name: self._builder(TASKS[name]) for name in self.settings.tasks}

    def _builder(self, task: TaskSpec) -> Builder:
        if task.needles is not None:
            return NeedleBuilder(task.needles, self.settings.wording, self.encoder, self.haystack)
        if task.family == "vt":
            return ChainBuilder(self.encoder)
        if task.family == "cwe":
            return ListBuilder(self.encoder, read_words(self.settings.words) if self.settings.words else ())
        if task.family == "fwe":
            return CodedBuilder(self.encoder)
        return load_questions(getattr(self.settings, task.name), "--" + task.name.replace("_", "-"), self.encoder)


class RulerTask(TextTask):
    """A grid of lengths and tasks."""

    command = "ruler"
    fields: ClassVar[tuple[str, ...]] = ("method", "length", "task", "sample")
    plots = ("tasks.png",)
    open_settings = ("chat_template", "dtype", "device")
    score = "score"
    row_label, score_label = "", "RULER's score"
    measures = ("score",)
    maker_type = RulerMaker
    settings: RulerSettings

    def alike(self, point: GridPoint) -> Any:
        return point.length, point.row

    def scores(self, prompt: TextPrompt, answer: str) -> dict[str, Any]:
        task = TASKS[prompt.point.row]
        return {"wording": self.settings.wording, "score": task.score(answer, prompt.expected)}

    def column(self, records: Sequence[Record]) -> dict[str, Any]:
        """The mean of each task, and over tasks: each weighs the same."""
        means = {task: mean_of([r["score"] for r in records if r["task"] == task]) for task in self.settings.tasks}
        scores = {task: score for task, score in means.items() if score is not None}
        return {"score": mean_of(list(scores.values())), "tasks": scores}

    def facts(self, methods: dict[str, Any]) -> dict[str, Any]:
        """With ``void``: of each length the tasks on which dense stays below one half."""
        dense, settings = methods.get(DENSE, {"lengths": {}})["lengths"], self.settings
        return {
            "wording": settings.wording,
            "haystack": settings.haystack,
            "tasks": list(settings.tasks),
            "void": {n: [t for t, score in column["tasks"].items() if score < VOID] for n, column in dense.items()},
        }

    def title(self) -> str:
        """Model, tasks, haystack, and whether compression saw the question."""
        settings = self.settings
        prose = "built-in sentences" if settings.haystack == "grammar" else settings.haystack
        wording = "" if settings.wording == "ruler" else f", {settings.wording} model's wording"
        tasks = f"{len(settings.tasks)} of {len(TASKS)} tasks"
        return f"RULER: {self.name}, {tasks}, prose: {prose}{wording}, {self.aware}"

    def render(self, summary: dict[str, Any]) -> str:
        """Score per length with cost, then per task at each length; tasks that say nothing are named below."""
        methods, settings = summary["methods"], self.settings
        lengths = [n for n in settings.lengths if any(str(n) in entry["lengths"] for entry in methods.values())]
        blocks = [self.title(), "\n".join(by_length("score", methods, lengths, "score"))]
        blocks += [self._by_task(methods, length) for length in lengths]
        blocks += void(summary)
        blocks.append(f"samples per task and length: {settings.samples}{missing(summary)}")
        return "\n\n".join(blocks)

    def _by_task(self, methods: dict[str, Any], length: int) -> str:
        rows = [[length_label(length), *(task.removeprefix("niah_") for task in self.settings.tasks)]]
        for name, entry in methods.items():
            scores = entry["lengths"].get(str(length), {"tasks": {}})["tasks"]
            rows.append([name, *(number(scores.get(task)) for task in self.settings.tasks)])
        return "\n".join(aligned(rows))
