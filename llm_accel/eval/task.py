"""What an evaluation gives to the frame that runs it: places, prompts, answers, scores, a table and pictures."""

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


class Prompt(Protocol):
    """What a record is about: its ``key`` are the values of the task's ``fields`` after the method."""

    @property
    def key(self) -> tuple[Any, ...]: ...


PlaceT = TypeVar("PlaceT")
PromptT = TypeVar("PromptT", bound=Prompt)
OutcomeT = TypeVar("OutcomeT")


@dataclass(frozen=True, kw_only=True)
class RunOptions(OutputOptions):
    """How a run is carried out, which does not change what its records say."""

    shard: tuple[int, int] = option(
        "run the I-th of N parts; they may share --out",
        (1, 1),
        metavar="I/N",
        parse=parse_shard,
        shown="1/1",
        group="run",
    )


class Task(ABC, Generic[PlaceT, PromptT, OutcomeT]):
    """One evaluation of several methods on one model.

    A place is what a run is divided by, over shards and when it goes on; it has one prompt or several, and each method
    leaves one record of every prompt.

    Attributes:
        command: name of the command.
        fields: of a record, what tells it from all others.
        plots: patterns of the pictures that are written.
        open_settings: settings that model and data fill in, so that they are not known beforehand.
        score: the field of a record whose mean is shown while it runs.
        unit: what :meth:`size` counts.
        settings: everything that decides what the records say.
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
    configs: Configs
    name: str

    @property
    @abstractmethod
    def wanted(self) -> int:
        """Records of the whole run."""

    @abstractmethod
    def digest(self) -> str:
        """Hash over the prompts, 16 hex digits: a run goes on only with the same ones."""

    def about(self) -> dict[str, Any]:
        """What else run.json should tell."""
        return {}

    def warnings(self) -> list[str]:
        """What the user should know before it runs."""
        return []

    @abstractmethod
    def try_method(self, configs: Sequence[MethodConfig]) -> None:
        """Raises what applying the methods would, so that it is known before a run begins."""

    @abstractmethod
    def places(self) -> Sequence[PlaceT]:
        """All places, cheap ones first."""

    @abstractmethod
    def keys(self, place: PlaceT) -> Iterable[tuple[Any, ...]]:
        """Keys of the prompts of a place, without the work of making them."""

    @abstractmethod
    def size(self, place: PlaceT) -> int:
        """What a place costs, for the progress bar."""

    def announce(self, lacking: Mapping[PlaceT, Sequence[str]]) -> str | None:
        """What there is to do, in words; ``lacking``: methods by place."""
        return None

    @abstractmethod
    def batches(self, places: Iterable[PlaceT]) -> Iterator[Sequence[PlaceT]]:
        """Places whose prompts may be answered in one call."""

    @abstractmethod
    def prompts(self, place: PlaceT) -> Sequence[PromptT]:
        """The prompts of a place."""

    @abstractmethod
    def calls(self, prompts: Sequence[PromptT], configs: Sequence[MethodConfig]) -> Iterable[Sequence[PromptT]]:
        """The prompts of a batch, divided into calls of the model."""

    @abstractmethod
    def answer(self, prompts: Sequence[PromptT], configs: Sequence[MethodConfig]) -> OutcomeT:
        """The answers to the prompts of a call, and what they cost; the methods are on the model meanwhile."""

    @abstractmethod
    def record(self, prompt: PromptT, row: int, outcome: OutcomeT) -> Record:
        """What is written of a prompt, the ``row``-th of its call."""

    @abstractmethod
    def summarize(self, records: Sequence[Record], **about: Any) -> dict[str, Any]:
        """Records to plain data; ``about`` comes first in it."""

    @abstractmethod
    def render(self, summary: dict[str, Any]) -> str:
        """The summary as text tables."""

    @abstractmethod
    def draw(self, summary: dict[str, Any], records: Sequence[Record], folder: Path) -> None:
        """Writes the pictures."""
