"""Tasks whose prompts are text of exact length: a grid of lengths and rows, answered by a language model."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, Self

from llm_accel.common.arguments import ModelOptions, haystack_option, methods_option
from llm_accel.common.loading import load_text_model, short_name
from llm_accel.common.options import option
from llm_accel.eval import grid
from llm_accel.eval.engine import TextEngine, TextOutcome
from llm_accel.eval.grid import GridPoint, Speed
from llm_accel.eval.heatmap import PALETTES, Panel, draw
from llm_accel.eval.lengths import lengths_option
from llm_accel.eval.plots import save
from llm_accel.eval.prompts.maker import PromptMaker, TextPrompt
from llm_accel.eval.records import Record
from llm_accel.eval.summary import by_method, mean_of, progress_of
from llm_accel.eval.task import RunOptions, Task
from llm_accel.methods import MethodConfig
from llm_accel.registry import parse_all

_PROBE_LENGTHS = (512, 2048)
_PROBE_SECONDS = 2.0  # a first probe slower than this is not followed by a longer one


@dataclass(frozen=True, kw_only=True)
class TextSettings(ModelOptions):
    """Everything that determines the records of a run. Runs with equal settings may share a directory.

    ``methods`` are specifications in canonical form, no two alike, ``dense`` among them; ``lengths`` are ascending.
    """

    methods: tuple[str, ...] = methods_option("dense is the plain model", ("dense",))
    lengths: tuple[int, ...] = lengths_option("prompt lengths in tokens", "1k")
    samples: int = option("prompts per cell", 1, least=1, group="prompts")
    haystack: str = haystack_option("prose to hide needles in", "prompts")
    query_agnostic: bool | None = option(
        "compress the context before the question is known; the question follows on the same cache",
        False,
        group="prompts",
    )
    chat_template: bool | None = option("default: on if the tokenizer has one", None, group="prompts")
    seed: int = option("seed of the prompts", 0, group="prompts")
    batch_size: int = option("prompts per call", 1, least=1, group="run")

    @property
    def rows(self) -> tuple[Any, ...]:
        """The rows of the grid, such as depths."""
        raise NotImplementedError

    @property
    def model_name(self) -> str:
        """The model's name in titles."""
        return "bundled needle model" if self.model is None else short_name(self.model)


SHARED = (
    "read each prompt once for the dense model and all methods that evict at its end: the same answers for less time, "
    "with the whole cache and all queries of a prompt in memory"
)


@dataclass(frozen=True, kw_only=True)
class TextRunOptions(RunOptions):
    """How a run on text is carried out."""

    shared_prefill: bool = option(SHARED, False, group="run")
    palette: str = option("safe: for colour-blind readers", "classic", choices=tuple(sorted(PALETTES)), group="output")


class TextTask(Task[GridPoint, TextPrompt, TextOutcome]):
    """A grid of prompts on a language model.

    Attributes:
        row_label, score_label: what the heat map calls its rows and its colours.
        measures: entries of a column that are averaged.
        palette: its colours.
    """

    maker_type: ClassVar[type[PromptMaker]]
    row_label: ClassVar[str]
    score_label: ClassVar[str]
    measures: ClassVar[tuple[str, ...]]

    settings: TextSettings

    def __init__(
        self, model: Any, tokenizer: Any, maker: PromptMaker, palette: str = "classic", shared_prefill: bool = False
    ) -> None:
        self.settings, self.model, self.maker, self.palette = maker.settings, model, maker, palette
        self.engine = self.make_engine(tokenizer, shared_prefill)
        self.configs = {method: parse_all(method) for method in self.settings.methods}
        self.name = self.settings.model_name

    @classmethod
    def load(cls, settings: Any, palette: str = "classic", shared_prefill: bool = False) -> Self:
        """The task with model and prompts; raises :class:`ConfigError` for what cannot be loaded or made."""
        model, tokenizer, settings = load_text_model(settings)
        return cls(model, tokenizer, cls.maker_type.load(settings, tokenizer), palette, shared_prefill)

    def make_engine(self, tokenizer: Any, shared_prefill: bool) -> Any:
        """What answers the prompts; see :class:`Task`."""
        return TextEngine(self.model, tokenizer, bool(self.settings.query_agnostic), shared=shared_prefill)

    @property
    def wanted(self) -> int:
        """Records of the whole run."""
        return len(self.settings.methods) * len(self.items())

    @property
    def trained_length(self) -> int | None:
        """The model's maximum length; None if unknown."""
        found: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return found

    def digest(self) -> str:
        """Hash over the first prompt of every cell."""
        return self.maker.digest(self.settings.lengths, self.settings.rows)

    def about(self) -> dict[str, Any]:
        """Size and hash of the haystack."""
        return {"haystack_tokens": self.maker.haystack.tokens, "haystack_hash": self.maker.haystack.digest()}

    def warnings(self) -> list[str]:
        """Whether prompts exceed the model's maximum length."""
        ends = (GridPoint(max(self.settings.lengths), row, 0) for row in self.settings.rows)
        longest, trained = max(self.maker.length(e) + self.maker.new_tokens(e) for e in ends), self.trained_length
        if trained is None or longest <= trained:
            return []
        return [f"the model was made for {trained} tokens, prompts and answers go to {longest}"]

    def items(self) -> Sequence[GridPoint]:
        """Every cell and sample."""
        return grid.points(self.settings.lengths, self.settings.rows, self.settings.samples)

    def keys(self, point: GridPoint) -> Iterable[tuple[Any, ...]]:
        """A point has one prompt."""
        return [point.key]

    def size(self, point: GridPoint) -> int:
        """Tokens of the prompt."""
        return self.maker.length(point)

    def announce(self, lacking: Mapping[GridPoint, Sequence[str]]) -> str | None:
        """Cells, prompts, tokens, and how long they take, estimated on one or two prompts."""
        speed = self._probe(next(iter(lacking)).row)
        make = self.maker
        return grid.cost(
            [(p, make.length(p), make.new_tokens(p), len(methods)) for p, methods in lacking.items()], speed
        )

    def _probe(self, row: Any) -> Speed:
        """Speed of the dense model; it warms up the model as well."""
        timed: list[tuple[int, float]] = []
        step = 0.0
        shortest, longest = min(self.settings.lengths), max(self.settings.lengths)
        for length in sorted({max(min(n, longest), shortest) for n in _PROBE_LENGTHS}):
            prompt = self.maker.make(GridPoint(length, row, 0))
            if not timed:
                self.engine.run([prompt], ())  # the first call also pays for set-up
            outcome = self.engine.run([prompt], ())
            timed.append((length, (outcome.prefill_ms or 0.0) / 1e3))
            step = (outcome.decode_ms or 0.0) / 1e3
            if timed[-1][1] > _PROBE_SECONDS:
                break
        return Speed.fit(timed[0], timed[1] if len(timed) > 1 else None, step)

    def alike(self, point: GridPoint) -> Any:
        """What the prompts of a batch have in common: their exact length, so that no padding is needed."""
        return point.length

    def batches(self, items: Iterable[GridPoint]) -> Iterator[Sequence[GridPoint]]:
        """Points whose prompts may share a call."""
        return grid.batches(items, self.settings.batch_size, self.alike)

    def prompts(self, point: GridPoint) -> Sequence[TextPrompt]:
        """The prompt of a point."""
        return [self.maker.make(point)]

    def agnostic(self, point: GridPoint) -> bool:
        """Whether the question of a prompt follows after compression."""
        return bool(self.settings.query_agnostic)

    def calls(self, prompts: Sequence[TextPrompt], configs: Sequence[MethodConfig]) -> Iterable[Sequence[TextPrompt]]:
        """All in one call; two-step prompts are grouped by context length, so that they need no padding either."""
        if not self.agnostic(prompts[0].point):
            return [prompts]
        ordered = sorted(prompts, key=lambda prompt: prompt.context_length)
        return [list(group) for _, group in groupby(ordered, key=lambda prompt: prompt.context_length)]

    def record(self, prompt: TextPrompt, row: int, outcome: TextOutcome) -> Record:
        """The answer, its scores and its cost; times are those of its call."""
        ids = outcome.answers[row]
        answer = self.maker.encoder.decode(ids)
        return {
            "query_agnostic": self.agnostic(prompt.point),
            "chat_template": self.maker.frame.chat,
            "answer": answer,
            "new_tokens": len(ids),
            "kv_bytes": outcome.kv_bytes,
            "dense_kv_bytes": outcome.dense_kv_bytes,
            "prompt_kv_bytes": None if outcome.prompt_bytes is None else outcome.prompt_bytes[0],
            "prompt_dense_kv_bytes": None if outcome.prompt_bytes is None else outcome.prompt_bytes[1],
            "prefill_ms": None if outcome.prefill_ms is None else round(outcome.prefill_ms, 3),
            "decode_ms_per_token": None if outcome.decode_ms is None else round(outcome.decode_ms, 3),
            "batch": len(outcome.answers),
            "prompt_hash": prompt.digest(),
            "seed": self.settings.seed,
            **dict(zip(self.fields[1:], prompt.key, strict=True)),
            "expected": list(prompt.expected),
            **self.scores(prompt, answer),
        }

    @abstractmethod
    def scores(self, prompt: TextPrompt, answer: str) -> dict[str, Any]:
        """The scores of an answer."""

    def summarize(self, records: Sequence[Record], **about: Any) -> dict[str, Any]:
        """For each method (see :func:`by_method`) the measures over all lengths, and a column per length."""
        settings = self.settings
        methods = by_method(settings.methods, settings.lengths, records, self.column, self.measures)
        facts = {"query_agnostic": settings.query_agnostic, **self.facts(methods)}
        return {**about, **facts, **progress_of(records, self.wanted), "methods": methods}

    @abstractmethod
    def column(self, records: Sequence[Record]) -> dict[str, Any]:
        """Summary of the records of one method and length, without cost."""

    @abstractmethod
    def facts(self, methods: dict[str, Any]) -> dict[str, Any]:
        """Further entries of the summary."""

    @abstractmethod
    def title(self) -> str:
        """One line that describes the run."""

    @property
    def aware(self) -> str:
        """Whether compression sees the question, for titles."""
        return "query-agnostic (question after compression)" if self.settings.query_agnostic else "query-aware"

    def draw(self, summary: dict[str, Any], records: Sequence[Record], folder: Path) -> None:
        """The heat map, one panel per method."""
        settings, plural = self.settings, "s" if self.settings.samples > 1 else ""
        panels = [
            Panel(method, self.cell_means(records, method), entry[self.score])
            for method, entry in summary["methods"].items()
        ]
        figure = draw(
            panels,
            settings.lengths,
            settings.rows,
            self.title(),
            f"{settings.samples} prompt{plural} per cell; beside each name: the mean",
            self.trained_length,
            self.palette,
            row_label=self.row_label,
            score=self.score_label,
        )
        save(folder / self.plots[0], figure)

    def cell_means(self, records: Sequence[Record], method: str) -> list[list[float | None]]:
        """Mean score per cell, rows and columns as in the settings; None where nothing ran."""
        found = defaultdict(list)
        for record in records:
            if record["method"] == method:
                found[record[self.fields[2]], record["length"]].append(record[self.score])
        return [[mean_of(found[row, length]) for length in self.settings.lengths] for row in self.settings.rows]
