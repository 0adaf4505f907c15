"""The needle task: one needle or several at a depth of the haystack, and whether the model still finds them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from llm_accel.common.loading import load_text_model
from llm_accel.eval.grid import Place
from llm_accel.eval.prompts.maker import Prompt, PromptMaker
from llm_accel.eval.prompts.needles import NeedleBuilder
from llm_accel.eval.prompts.puzzle import Puzzle
from llm_accel.eval.records import Record
from llm_accel.eval.tasks.needle import table
from llm_accel.eval.tasks.needle.scoring import score
from llm_accel.eval.tasks.needle.settings import Settings
from llm_accel.eval.tasks.needle.summary import summarize
from llm_accel.eval.text_task import TextTask, prepare

_MARGIN, _MARGIN_WITHOUT_PREFIX = 4, 64  # new tokens beyond the answer's own


@dataclass(frozen=True)
class NeedleMaker(PromptMaker):
    """Prompts of the grid; ``length`` is that of the whole prompt."""

    settings: Settings

    @cached_property
    def builder(self) -> NeedleBuilder:
        """What draws the needles."""
        return NeedleBuilder(self.settings.hidden, "bundled", self.encoder, self.haystack)

    def puzzle(self, place: Place) -> Puzzle:
        rng = random.Random(f"needle/{self.settings.seed}/{place.length}/{place.row}/{place.sample}")
        drawn = self.builder.draw_at(rng, place.row)
        return drawn if self.settings.answer_prefix else replace(drawn, prefix=None)

    def label(self, place: Place) -> str:
        return "the prompt with template, question and needles"

    def new_tokens(self, place: Place) -> int:
        return self.max_new_tokens

    @cached_property
    def max_new_tokens(self) -> int:
        """What the settings say, or what a drawn answer takes and some more."""
        if self.settings.max_new_tokens is not None:
            return self.settings.max_new_tokens
        answers = self.builder.draw_at(random.Random("answer"), 0.0).answers
        margin = _MARGIN if self.settings.answer_prefix else _MARGIN_WITHOUT_PREFIX
        return len(self.encoder.continuation(", ".join(answers) + " and.")) + margin


def make_prompts(settings: Settings, tokenizer: Any) -> tuple[NeedleMaker, Settings]:
    """The prompt maker, and the settings with what the tokenizer decides filled in.

    Raises:
        ConfigError: no room for the needles at the shortest length, an unreadable haystack, no chat template.
    """
    settings, encoder, frame, haystack = prepare(settings, tokenizer)
    new_tokens = NeedleMaker(encoder, frame, haystack, settings).max_new_tokens
    settings = replace(settings, max_new_tokens=new_tokens)
    maker = NeedleMaker(encoder, frame, haystack, settings)
    for depth in settings.depths:  # if any length is too short, it is this one
        for sample in range(settings.samples):
            maker.make(Place(min(settings.lengths), depth, sample))
    return maker, settings


class NeedleTask(TextTask):
    """A grid of lengths and depths."""

    command = "needle"
    fields = ("method", "length", "depth", "sample")
    plots = ("heatmap.png",)
    open_settings = ("chat_template", "max_new_tokens", "dtype", "device")
    row_label, score_label = "needle depth in %", "exact match"
    settings: Settings

    @classmethod
    def load(cls, settings: Settings, palette: str = "classic") -> NeedleTask:
        """With model and prompts; raises :class:`ConfigError` for what cannot be loaded or made."""
        model, tokenizer, settings = load_text_model(settings)
        maker, settings = make_prompts(settings, tokenizer)
        return cls(settings, model, tokenizer, maker, palette)

    def scores(self, prompt: Prompt, answer: str) -> dict[str, Any]:
        return {
            "task": self.settings.task,
            **score(answer, prompt.expected, self.settings.value_kind),
            "needle_tokens": list(prompt.needles),
        }

    def summarize(self, records: Sequence[Record], **about: Any) -> dict[str, Any]:
        return summarize(self.settings, records, self.wanted, **about)

    def title(self) -> str:
        return table.title(self.settings, self.name)

    def render(self, summary: dict[str, Any]) -> str:
        return table.render(self.settings, summary, self.name)
