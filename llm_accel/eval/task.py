"""What an evaluation gives to the frame that runs it: items, prompts, answers, scores, a table and pictures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from llm_accel.common.arguments import ModelOptions, OutputOptions, parse_shard
from llm_accel.common.options import option
from llm_accel.eval.records import Record
from llm_accel.methods import MethodConfig

Configs = Mapping[str, Sequence[MethodConfig]]


class KeyedPrompt(Protocol):
    """What a record is about: its ``key`` holds the values of the task's ``fields`` after the method."""

    @property
    def key(self) -> tuple[Any, ...]: ...


ItemT = TypeVar("ItemT")
PromptT = TypeVar("PromptT", bound=KeyedPrompt)
OutcomeT = TypeVar("OutcomeT")


@dataclass(frozen=True, kw_only=True)
class RunOptions(OutputOptions):
    """How a run is carried out, without effect on its records."""

    shard: tuple[int, int] = option(
        "run the I-th of N parts; they may share --out",
        (1, 1),
        metavar="I/N",
        parse=parse_shard,
        shown="1/1",
        group="run",
    )


class Task(ABC, Generic[ItemT, PromptT, OutcomeT]):
    """One evaluation of several methods on one model.

    An item is the unit that shards and resumed runs divide the work by. It has one prompt or several, and every method
    leaves one record per prompt.

    Attributes:
        command: name of the command.
        fields: the fields of a record that identify it.
        plots: glob patterns of the pictures that are written.
        open_settings: settings that model and data fill in, unknown before they are loaded.
        score: the field of a record whose mean the progress bar shows.
        unit: what :meth:`size` counts.
        settings: everything that decides what the records say.
        engine: ``run(prompts, configs)`` answers prompts with methods applied to the model, ``try_method(configs)``
            only applies and removes them.
        configs: the methods, by the name that records and tables show.
        name: what titles call the model.
    """

    command: ClassVar[str]
    fields: ClassVar[tuple[str, ...]]
    plots: ClassVar[tuple[str, ...]]
    open_settings: ClassVar[tuple[str, ...]]
    score: ClassVar[str] = "exact"
    unit: ClassVar[str] = "tok"

    settings: ModelOptions
    model: Any
    engine: Any
    configs: Configs
    name: str

    @property
    @abstractmethod
    def wanted(self) -> int:
        """Number of records of the whole run."""

    @abstractmethod
    def digest(self) -> str:
        """Hash over the prompts, 16 hex digits: a run is only continued with the same ones."""

    def about(self) -> dict[str, Any]:
        """Further entries of run.json."""
        return {}

    def warnings(self) -> list[str]:
        """What the user should know before the run starts."""
        return []

    @abstractmethod
    def items(self) -> Sequence[ItemT]:
        """All items, cheap ones first."""

    @abstractmethod
    def keys(self, item: ItemT) -> Iterable[tuple[Any, ...]]:
        """Keys of the prompts of an item, without making the prompts."""

    def size(self, item: ItemT) -> int:
        """What an item costs, for the progress bar."""
        return 1

    def announce(self, lacking: Mapping[ItemT, Sequence[str]]) -> str | None:
        """The remaining work, in words; ``lacking``: the methods without a record, by item."""
        return None

    def batches(self, items: Iterable[ItemT]) -> Iterator[Sequence[ItemT]]:
        """Items whose prompts may be answered in one call."""
        return ((item,) for item in items)

    @abstractmethod
    def prompts(self, item: ItemT) -> Sequence[PromptT]:
        """The prompts of an item."""

    @abstractmethod
    def calls(self, prompts: Sequence[PromptT], configs: Sequence[MethodConfig]) -> Iterable[Sequence[PromptT]]:
        """The prompts of a batch, divided into calls of the model."""

    def answer(self, prompts: Sequence[PromptT], configs: Sequence[MethodConfig]) -> OutcomeT:
        """The answers to the prompts of one call, and what they cost."""
        outcome: OutcomeT = self.engine.run(prompts, configs)
        return outcome

    @abstractmethod
    def record(self, prompt: PromptT, row: int, outcome: OutcomeT) -> Record:
        """What is written about a prompt, the ``row``-th of its call."""

    @abstractmethod
    def summarize(self, records: Sequence[Record], **about: Any) -> dict[str, Any]:
        """The summary as plain data; ``about`` comes first in it."""

    @abstractmethod
    def render(self, summary: dict[str, Any]) -> str:
        """The summary as text tables."""

    @abstractmethod
    def draw(self, summary: dict[str, Any], records: Sequence[Record], folder: Path) -> None:
        """Writes the pictures."""
