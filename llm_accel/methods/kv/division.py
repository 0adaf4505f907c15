"""How a budget is divided over layers or heads, independent of the scores that choose within it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from llm_accel.errors import ConfigError
from llm_accel.kernels.dispatch import Problem
from llm_accel.methods.base import MethodConfig, option, option_names
from llm_accel.methods.catalog import imported_methods, list_methods
from llm_accel.methods.kv.snapkv import SnapKVOptions
from llm_accel.methods.prompt_view import Depth, PromptView
from llm_accel.methods.roles import PromptCompression, ScoreAndKeep


@dataclass(frozen=True)
class Division(SnapKVOptions):
    """Divides the budget that another method, the base, would spend evenly; entries are chosen by the base's scores.
    Budgets, turns and the options of SnapKV are given here and handed on; other options of a base follow its name."""

    base: str = option(
        "method that scores the entries; options that only it has follow its name, as in random:seed=3", "snapkv"
    )

    divides: ClassVar[Literal["layers", "heads"]]
    for_base: ClassVar[frozenset[str]] = option_names(SnapKVOptions)

    def validate(self) -> None:
        self.scorer.validate()

    @cached_property
    def scorer(self) -> PromptCompression:
        """The base with its options.

        Raises:
            ConfigError: there is no such base, or its options cannot work.
        """
        name, _, rest = self.base.partition(":")
        kind, own = self._base_class(name), _texts(rest)
        handed = self._handed(kind, own)
        try:
            return kind(**handed, **kind.typed(own))
        except ConfigError as error:
            where = "" if self.base == "snapkv" else f"base={self.base}: "
            raise ConfigError(f"{self.name}: {where}{str(error).removeprefix(f'{kind.name}: ')}") from error

    @property
    def score_method(self) -> PromptCompression:
        """The method that scores: the base, or the base of a base that divides too."""
        return self.scorer.score_method if isinstance(self.scorer, Division) else self.scorer

    @property
    def reserved(self) -> int:
        return self.scorer.reserved

    @property
    def reserved_for(self) -> str:
        return self.scorer.reserved_for

    @property
    def observed_queries(self) -> int:
        return self.scorer.observed_queries

    def backends(self, problem: Problem) -> dict[str, tuple[str, str]]:
        return self.score_method.backends(problem)

    def score_and_tie_break(self, view: PromptView) -> tuple[Tensor, Tensor | None]:
        return self.scorer.score_and_tie_break(view)

    def always_keep(self, view: PromptView) -> Tensor | None:
        return self.scorer.always_keep(view)

    def layer_entries(self, length: int, depth: Depth) -> int:
        return int(self.layer_entries_per_row(torch.tensor([length]), depth)[0])

    def layer_entries_per_row(self, lengths: Tensor, depth: Depth) -> Tensor:
        return self.scorer.layer_entries_per_row(lengths, depth)

    def _base_class(self, name: str) -> type[PromptCompression]:
        kind = list_methods().get(name)
        if kind is None or not self._takes(kind):
            allowed = [name for name, kind in imported_methods().items() if self._takes(kind)]
            self.fail("base", f"a method with a score ({', '.join(allowed)}), its own options as in random:seed=3")
        assert issubclass(kind, PromptCompression)
        return kind

    def _takes(self, kind: type[MethodConfig]) -> bool:
        """Whether a method leaves to the base class what this one divides."""
        if issubclass(kind, Division):
            return (kind.divides, self.divides) == ("layers", "heads")
        divides = ("select", "allocate", "layer_entries_per_row", "page_size")
        return issubclass(kind, PromptCompression) and all(
            getattr(kind, key) is getattr(ScoreAndKeep, key) for key in divides
        )

    def _handed(self, kind: type[PromptCompression], own: dict[str, str]) -> dict[str, Any]:
        """The options that are given here and meant for the base; ``own`` are those that follow its name."""
        common = option_names(PromptCompression)
        handed = option_names(kind) & (self.for_base if issubclass(kind, SnapKVOptions) else common)
        twice = sorted(handed & own.keys())
        if twice:
            raise ConfigError(f"{self.name}: base={self.base}: give {', '.join(twice)} to {self.name} itself.")
        for key in self.changed():
            if key in self.for_base - handed:
                owner = next(name for name, other in imported_methods().items() if key in option_names(other))
                self.fail(key, f"it together with base={owner!r}, or after the name of the base if it has one")
        return {key: getattr(self, key) for key in handed}


def _texts(rest: str) -> dict[str, str]:
    """``seed=3:window=8`` as options; ``base`` takes all that follows it."""
    options: dict[str, str] = {}
    while rest:
        key, _, rest = rest.partition("=")
        value, _, rest = (rest, "", "") if key == "base" else rest.partition(":")
        options[key.strip()] = value.strip()
    return options
