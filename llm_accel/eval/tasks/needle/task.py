"""The needle task: one needle or several at a depth of the haystack, and whether the model still finds them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

from llm_accel.common.statistics import wilson
from llm_accel.eval.grid import GridPoint
from llm_accel.eval.prompts.maker import PromptMaker, TextPrompt
from llm_accel.eval.prompts.needles import NeedleBuilder
from llm_accel.eval.prompts.template import PromptTemplate
from llm_accel.eval.records import Record
from llm_accel.eval.summary import mean_of
from llm_accel.eval.table import NONE, by_length, missing
from llm_accel.eval.tasks.needle.scoring import score
from llm_accel.eval.tasks.needle.settings import NeedleSettings
from llm_accel.eval.text_task import TextTask

_MARGIN, _MARGIN_WITHOUT_PREFIX = 4, 64  # new tokens beyond the answer's own


@dataclass(frozen=True)
class NeedleMaker(PromptMaker):
    """Prompts of the grid; ``length`` is that of the whole prompt."""

    settings: NeedleSettings

    @classmethod
    def load(cls, settings: NeedleSettings, tokenizer: Any) -> Self:
        maker = super().load(settings, tokenizer)
        return replace(maker, settings=replace(maker.settings, max_new_tokens=maker.max_new_tokens))

    @cached_property
    def builder(self) -> NeedleBuilder:
        """Draws the needles."""
        return NeedleBuilder(self.settings.hidden, "bundled", self.encoder, self.haystack)

    def template(self, point: GridPoint) -> PromptTemplate:
        rng = random.Random(f"needle/{self.settings.seed}/{point.length}/{point.row}/{point.sample}")
        drawn = self.builder.draw_at(rng, point.row)
        return drawn if self.settings.answer_prefix else replace(drawn, prefix=None)

    def label(self, point: GridPoint) -> str:
        return "the prompt with template, question and needles"

    def new_tokens(self, point: GridPoint) -> int:
        return self.max_new_tokens

    @cached_property
    def max_new_tokens(self) -> int:
        """From the settings, or what a drawn answer takes, with a margin."""
        if self.settings.max_new_tokens is not None:
            return self.settings.max_new_tokens
        answers = self.builder.draw_at(random.Random("answer"), 0.0).answers
        margin = _MARGIN if self.settings.answer_prefix else _MARGIN_WITHOUT_PREFIX
        return len(self.encoder.continuation(", ".join(answers) + " and.")) + margin


class NeedleTask(TextTask):
    """A grid of lengths and depths."""

    command = "needle"
    fields = ("method", "length", "depth", "sample")
    plots = ("heatmap.png",)
    open_settings = ("chat_template", "max_new_tokens", "dtype", "device")
    row_label, score_label = "needle depth in %", "exact match"
    measures = ("exact", "rouge1_recall", "recall")
    maker_type = NeedleMaker
    settings: NeedleSettings

    def scores(self, prompt: TextPrompt, answer: str) -> dict[str, Any]:
        return {
            "task": self.settings.task,
            **score(answer, prompt.expected, self.settings.value_kind),
            "needle_tokens": list(prompt.needles),
        }

    def column(self, records: Sequence[Record]) -> dict[str, Any]:
        """Means, and of exact matches the 95 % Wilson interval."""
        hits = sum(record["exact"] for record in records)
        means = {name: mean_of([record[name] for record in records]) for name in self.measures}
        return {**means, "ci95": [round(end, 4) for end in wilson(hits, len(records))]}

    def facts(self, methods: dict[str, Any]) -> dict[str, Any]:
        return {"task": self.settings.task}

    def title(self) -> str:
        """Model, task, kinds, and whether the question was seen during compression."""
        settings, plural = self.settings, "s" if self.settings.needles > 1 else ""
        needles = f"{settings.needles} needle{plural}"
        if settings.distractors:
            needles += f" + {settings.distractors} distractors"
        kinds = f"{settings.key_kind} -> {settings.value_kind}"
        return f"needle: {self.name}, {settings.task}, {needles}, {kinds}, {self.aware}"

    def render(self, summary: dict[str, Any]) -> str:
        """Exact match per length with 95 % Wilson intervals below, mean, difference to dense, memory and speed."""
        methods: dict[str, Any] = summary["methods"]
        more, below = {"ROUGE-1 recall": "rouge1_recall"}, ("95 % interval", "ci95")
        table = by_length("exact match", methods, self.settings.lengths, "exact", more, below)
        counts = sorted({column["n"] for m in methods.values() for column in m["lengths"].values()})
        n = NONE if not counts else str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        return "\n".join([self.title(), *table, f"samples per length: {n}{missing(summary)}"])
