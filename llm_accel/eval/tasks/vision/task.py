"""The vision task: accuracy and hallucination with fewer visual tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from llm_accel.common.loading import load_vision_model, short_name
from llm_accel.eval.grid import chunks
from llm_accel.eval.plots import save
from llm_accel.eval.records import Record
from llm_accel.eval.task import Task as EvalTask
from llm_accel.eval.tasks.vision import curves, pictures, table
from llm_accel.eval.tasks.vision.controls import InputControl
from llm_accel.eval.tasks.vision.engine import VisionEngine, VisionOutcome
from llm_accel.eval.tasks.vision.examples import Example, SceneSource, Source
from llm_accel.eval.tasks.vision.generated import GeneratedSource
from llm_accel.eval.tasks.vision.processor import VisionProcessor
from llm_accel.eval.tasks.vision.question_file import QuestionFile
from llm_accel.eval.tasks.vision.questions import Task
from llm_accel.eval.tasks.vision.scenes import SplitName
from llm_accel.eval.tasks.vision.scoring import score
from llm_accel.eval.tasks.vision.settings import QUESTIONS, SCENES, VisionSettings, parse_method
from llm_accel.eval.tasks.vision.sources import load_rows
from llm_accel.eval.tasks.vision.summary import summarize
from llm_accel.methods import DyVTE, MethodConfig

PICTURED = 4  # images of which records say which patches stayed, for the pictures


def model_name(model: str | None, gaps: bool = True) -> str:
    """The model's name in titles."""
    if model is not None:
        return short_name(model)
    return "bundled vision model" if gaps else "bundled vision model without gaps in training"


def make_source(settings: VisionSettings) -> Source:
    """Where images and questions come from; raises :class:`ConfigError` for what cannot be read or drawn."""
    kind, _, place = settings.data.partition(":")
    if kind == QUESTIONS:
        return QuestionFile.load(place, settings.samples, settings.tasks)
    if kind != SCENES:
        return load_rows(settings.data, settings.samples)
    assert settings.samples is not None
    if place:
        return GeneratedSource.load(place, settings.samples, settings.seed, settings.tasks)
    tasks = cast(tuple[Task, ...], settings.tasks)
    return SceneSource(settings.samples, settings.seed, cast(SplitName, settings.split), tasks)


class VisionTask(EvalTask[int, Example, VisionOutcome]):
    """Questions about images; an item is the number of an image."""

    command = "vision"
    fields = ("method", "sample", "task", "number")
    plots = ("curves.png", "kept-*.png")
    open_settings = ("max_new_tokens", "dtype", "device")
    unit = "image"
    settings: VisionSettings

    def __init__(self, settings: VisionSettings, model: Any, engine: VisionEngine, source: Source) -> None:
        self.settings, self.model, self.engine, self.source = settings, model, engine, source
        self.configs = {method: parse_method(method) for method in settings.methods}
        self.name = model_name(settings.model, settings.gaps)
        self._questions, self._digest = source.digest()

    @classmethod
    def load(cls, settings: VisionSettings) -> VisionTask:
        """With model and data; raises :class:`ConfigError` for what cannot be loaded."""
        source = make_source(settings)
        new_tokens = settings.max_new_tokens or source.max_new_tokens
        model, processor, settings = load_vision_model(replace(settings, max_new_tokens=new_tokens), settings.gaps)
        engine = VisionEngine(model, VisionProcessor(processor, settings.prompt), new_tokens, settings.seed)
        return cls(settings, model, engine, source)

    @property
    def wanted(self) -> int:
        return self._questions * len(self.configs)

    def digest(self) -> str:
        return self._digest

    def about(self) -> dict[str, Any]:
        """The form of a prompt."""
        return {"prompt": self.engine.reader.text("{question}")}

    def items(self) -> Sequence[int]:
        return range(len(self.source))

    def keys(self, item: int) -> Iterable[tuple[Any, ...]]:
        return self.source.keys(item)

    def prompts(self, item: int) -> Sequence[Example]:
        return self.source.examples(item)

    def calls(self, prompts: Sequence[Example], configs: Sequence[MethodConfig]) -> Iterable[Sequence[Example]]:
        """Rows of a batch share the decision of routers, so there each prompt runs alone."""
        routed = any(isinstance(config, DyVTE) and config.routers is not None for config in configs)
        return chunks(prompts, 1 if routed else self.settings.batch_size)

    def record(self, prompt: Example, row: int, outcome: VisionOutcome) -> Record:
        """The answer, its scores and its cost; times and tokens are means over its call."""
        answer = outcome.answers[row]
        kept = None if outcome.kept is None else outcome.kept[row]
        record: Record = {
            **dict(zip(self.fields[1:], prompt.key, strict=True)),
            "split": prompt.split,
            **score(prompt.task, answer, (prompt.answer, *prompt.others), prompt.objects, self.source.mentions),
            "question": prompt.question,
            "expected": prompt.answer,
            "answer": answer,
            "patch_recall": patch_recall(kept, prompt),
            "visual_before": outcome.visual_before,
            "visual_after": round(outcome.visual_after, 3),
            "visual_per_layer": round(outcome.visual_per_layer, 3),
            "flops": outcome.flops,
            "prefill_ms": round(outcome.prefill_ms, 3),
            "batch": len(outcome.answers),
        }
        if prompt.sample < PICTURED and kept is not None:
            record["kept"] = [round(share, 2) for share in kept]
        return record

    def summarize(self, records: Sequence[Record], **about: Any) -> dict[str, Any]:
        ordered = sorted(records, key=lambda record: int(record["sample"]))  # parts of a run end in any order
        return summarize(self.settings, ordered, self.wanted, **about)

    def render(self, summary: dict[str, Any]) -> str:
        return table.render(self.settings, summary, self.name)

    def draw(self, summary: dict[str, Any], records: Sequence[Record], folder: Path) -> None:
        """Accuracy against tokens, and for each method which patches of a few scenes stay."""
        if not records:
            return
        save(folder / "curves.png", curves.draw(summary, table.title(self.settings, self.name)))
        for method, configs in self.configs.items():
            own = {(r["sample"], r["task"], r["number"]): r for r in records if r["method"] == method and "kept" in r}
            if own and any(not isinstance(config, InputControl) for config in configs):
                self._picture(method, own, folder)

    def _picture(self, method: str, kept: dict[tuple[Any, ...], Record], folder: Path) -> None:
        """The first questions about the first images, where it is known which patches the visual tokens are."""
        shown = []
        for sample in range(min(PICTURED, len(self.source))):
            for example in self.source.examples(sample):
                record = kept.get(example.key)
                if record and example.patches is not None and example.patches.size == len(record["kept"]):
                    shown.append((example, record))
                    break
        if shown:
            save(folder / pictures.file_name(method), pictures.draw(method, shown))


def patch_recall(kept: Sequence[float] | None, example: Example) -> float | None:
    """Share of the patches with objects on them that are kept; None where either is unknown, or the model does not see
    the image as these patches."""
    if kept is None or example.patches is None or len(kept) != example.patches.size:
        return None
    covered = example.patches.ravel().tolist()
    return round(sum(share for share, own in zip(kept, covered, strict=True) if own) / sum(covered), 4)
