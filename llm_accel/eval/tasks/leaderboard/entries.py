"""The rows of the board: methods found by the registry, each at every share of the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from llm_accel.errors import ConfigError, LlmAccelError
from llm_accel.methods import Auto, Dense, MethodConfig, RandomKV, StreamingLLM, list_methods
from llm_accel.methods.base import option_names
from llm_accel.methods.budget import fraction
from llm_accel.registry import parse

FLOORS = (StreamingLLM.name, RandomKV.name)  # what a method must beat


@dataclass(frozen=True)
class BoardEntry:
    """One method at one share."""

    method: MethodConfig  # without a budget
    ratio: float

    @property
    def by_ratio(self) -> bool:
        """Whether the method takes the share itself; otherwise it gets the budget that equals it."""
        return "ratio" in option_names(type(self.method))

    @property
    def name(self) -> str:
        """What records show: the specification, or one with the budget in percent of the prompt."""
        spec = self.method.spec()
        share = f"ratio={self.ratio:g}" if self.by_ratio else f"budget={100 * self.ratio:g}%"
        return f"{spec}{',' if ':' in spec else ':'}{share}"

    def at(self, tokens: int, later: bool = False) -> MethodConfig:
        """The configuration for prompts of this length, whose question may come later. Raises :class:`ConfigError`: the
        method cannot keep so few."""
        share = {"ratio": self.ratio} if self.by_ratio else {"budget": fraction(self.ratio, tokens)}
        known: dict[str, Any] = {}
        if isinstance(self.method, Auto):  # it is told what its user knows
            known = {"context": tokens, "question": "later" if later else "in_prompt"}
        return type(self.method)(**(known | self.method.changed()), **share)


def unsuitable(cls: type[MethodConfig]) -> str | None:
    """Why a method has no place on the board unless it is asked for, or None."""
    if not option_names(cls) & {"ratio", "budget"}:
        return "takes neither ratio nor budget"
    return None if cls.info.frees_memory else "frees no memory"


def registered() -> dict[str, str | None]:
    """The methods on text besides dense, and why they are not on the board, if they are not."""
    found: dict[str, str | None] = {}
    for name in list_methods():
        try:
            cls = list_methods()[name]
        except ConfigError as error:  # of another package
            found[name] = str(error)
            continue
        if cls is not Dense and "text" in cls.info.kinds:
            found[name] = unsuitable(cls)
    return found


def complete(specs: Iterable[str]) -> tuple[str, ...]:
    """The methods that were named, or all suitable ones, and the floors last. Raises :class:`ConfigError` for those
    that have a budget of their own, or take none."""
    specs = tuple(specs) or tuple(name for name, reason in registered().items() if reason is None)
    configs = [config for config in map(parse, specs) if config is not None]
    for config in configs:
        if not (taken := option_names(type(config)) & {"ratio", "budget"}):
            raise ConfigError(f"--method {config.spec()}: it takes neither ratio nor budget; leave it out.")
        if taken & config.changed().keys():
            raise ConfigError(f"--method {config.spec()}: the board sets the budget; leave it out and give --ratios.")
    floors = [config for config in configs if config.name in FLOORS]
    missing = [list_methods()[name]() for name in FLOORS if name not in {floor.name for floor in floors}]
    return tuple(config.spec() for config in (*(c for c in configs if c.name not in FLOORS), *floors, *missing))


def entries(
    specs: Sequence[str],
    ratios: Sequence[float],
    tokens: Sequence[int],
    try_method: Callable[[Sequence[MethodConfig]], None],
) -> tuple[dict[str, BoardEntry], dict[str, str]]:
    """The rows by name, and why others are left out: unsuitable, refused by the model, or too small a share.

    Args:
        tokens: lengths of the prompts.
        try_method: applies and removes a method.
    """
    methods = [method for method in map(parse, specs) if method is not None]
    named = {method.name for method in methods}
    found: dict[str, BoardEntry] = {}
    left_out = {name: reason for name, reason in registered().items() if reason and name not in named}
    for entry in (BoardEntry(method, ratio) for method in methods for ratio in ratios):
        try:
            try_method([entry.at(length) for length in tokens][:1])
            found[entry.name] = entry
        except LlmAccelError as error:
            left_out[entry.name] = str(error)
    return found, left_out
