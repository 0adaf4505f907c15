"""The RULER task (Hsieh et al. 2024, arXiv 2404.06654): thirteen kinds of prompts at exact lengths."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from llm_accel.common.loading import load_text_model
from llm_accel.eval.grid import Place
from llm_accel.eval.prompts.maker import Prompt, PromptMaker
from llm_accel.eval.prompts.needles import NeedleBuilder
from llm_accel.eval.prompts.puzzle import Builder, Puzzle
from llm_accel.eval.prompts.words import read_words
from llm_accel.eval.records import Record
from llm_accel.eval.tasks.ruler import table
from llm_accel.eval.tasks.ruler.chains import ChainBuilder
from llm_accel.eval.tasks.ruler.documents import load_questions
from llm_accel.eval.tasks.ruler.lists import CodedBuilder, ListBuilder
from llm_accel.eval.tasks.ruler.scoring import score
from llm_accel.eval.tasks.ruler.settings import Settings
from llm_accel.eval.tasks.ruler.summary import summarize
from llm_accel.eval.tasks.ruler.tasks import QA, TASKS, Task
from llm_accel.eval.text_task import TextTask, prepare


@dataclass(frozen=True)
class RulerMaker(PromptMaker):
    """Prompts of the tasks; ``length`` is that of prompt and answer together."""

    settings: Settings

    def puzzle(self, place: Place) -> Puzzle:
        rng = random.Random(f"ruler/{self.settings.seed}/{place.row}/{place.length}/{place.sample}")
        return self.builders[place.row].draw(rng, place.sample, place.length)

    def new_tokens(self, place: Place) -> int:
        return TASKS[place.row].new_tokens

    def length(self, place: Place) -> int:
        return place.length - self.new_tokens(place)

    @cached_property
    def builders(self) -> dict[str, Builder]:
        """What draws the puzzles of each task.

        Raises:
            ConfigError: the questions of a task, or the words for lists, cannot be read.
        """
        return {name: self._builder(TASKS[name]) for name in self.settings.tasks}

    def _builder(self, task: Task) -> Builder:
        if task.needles is not None:
            return NeedleBuilder(task.needles, self.settings.wording, self.encoder, self.haystack)
        if task.family == "vt":
            return ChainBuilder(self.encoder)
        if task.family == "cwe":
            return ListBuilder(self.encoder, read_words(self.settings.words) if self.settings.words else ())
        if task.family == "fwe":
            return CodedBuilder(self.encoder)
        return load_questions(getattr(self.settings, task.name), "--" + task.name.replace("_", "-"), self.encoder)


def make_prompts(settings: Settings, tokenizer: Any) -> tuple[RulerMaker, Settings]:
    """The prompt maker, and the settings with what the tokenizer decides filled in.

    Raises:
        ConfigError: no room for a task at the shortest length, an unreadable file, no chat template.
    """
    settings, encoder, frame, haystack = prepare(settings, tokenizer)
    maker = RulerMaker(encoder, frame, haystack, settings)
    for task in settings.tasks:  # a question's own documents may be longer than the others'
        for sample in range(settings.samples if task in QA else 1):
            maker.make(Place(min(settings.lengths), task, sample))
    return maker, settings


class RulerTask(TextTask):
    """A grid of lengths and tasks."""

    command = "ruler"
    fields = ("method", "length", "task", "sample")
    plots = ("tasks.png",)
    open_settings = ("chat_template", "dtype", "device")
    score = "score"
    row_label, score_label = "", "RULER's score"
    settings: Settings

    @classmethod
    def load(cls, settings: Settings, palette: str = "classic") -> RulerTask:
        """With model and prompts; raises :class:`ConfigError` for what cannot be loaded or made."""
        model, tokenizer, settings = load_text_model(settings)
        maker, settings = make_prompts(settings, tokenizer)
        return cls(settings, model, tokenizer, maker, palette)

    def alike(self, place: Place) -> Any:
        return place.length, place.row

    def scores(self, prompt: Prompt, answer: str) -> dict[str, Any]:
        task = TASKS[prompt.place.row]
        return {"wording": self.settings.wording, "score": score(task, answer, prompt.expected)}

    def summarize(self, records: Sequence[Record], **about: Any) -> dict[str, Any]:
        return summarize(self.settings, records, self.wanted, **about)

    def title(self) -> str:
        return table.title(self.settings, self.name)

    def render(self, summary: dict[str, Any]) -> str:
        return table.render(self.settings, summary, self.name)
