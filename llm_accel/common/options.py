"""Options declared once, as fields of a dataclass: Python, the command line and JSON share names, defaults and checks.

    @dataclass(frozen=True, kw_only=True)
    class Settings(Options):
        samples: int = option("prompts per cell", 1, least=1)

``Settings(samples=3)``, ``--samples 3`` and ``{"samples": 3}`` mean the same and are refused alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from llm_accel.errors import ConfigError, unknown_name

_LAST = ("run", "output")  # headings that follow those of the command itself


@dataclass(frozen=True)
class Spec:
    """Describes an option in addition to its name, type and default.

    Attributes:
        help: one line; the default is added to it unless it speaks of one.
        metavar: what stands for the value in the help, several for as many values; ``choices`` where not given.
        flag: on the command line; None: the name of the field; empty: no command takes it.
        group: the heading that it stands under.
        least: the lowest number; of several numbers, the lowest of each.
        choices: the allowed texts; of several texts, those of each.
        parse: from the text of the command line, or from the list of texts where ``repeated``, to the value.
        shown: the default as the command line would write it.
        repeated: whether it may be given several times.
    """

    help: str
    metavar: str | tuple[str, ...] | None = None
    flag: str | None = None
    group: str | None = None
    least: float | None = None
    choices: tuple[str, ...] | None = None
    parse: Callable[[Any], Any] | None = None
    shown: str | None = None
    repeated: bool = False


def option(help: str, default: Any, **more: Any) -> Any:
    """A dataclass field with a :class:`Spec`; ``more``: the other attributes of that."""
    return dataclasses.field(default=default, metadata={"spec": Spec(help, **more)})


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of all declared options: checked on construction, comparable, plain data."""

    def __post_init__(self) -> None:
        for field, spec in _declared(type(self)):
            given, name = getattr(self, field.name), (spec.flag or field.name).removeprefix("--")
            for value in given if isinstance(given, tuple) else (given,):
                if spec.least is not None:
                    at_least(spec.least, **{name: value})
                if spec.choices is not None and value is not None:
                    one_of(spec.choices, **{name: value})
        self.validate()

    def validate(self) -> None:
        """Checks of options against each other; raises :class:`ConfigError`."""

    def resolve(self, **values: Any) -> None:
        """Fills in options that were left open; for subclasses, on construction."""
        for name, value in values.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """Plain data as JSON reads it back (lists, not tuples)."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """What :meth:`to_dict` gave; :class:`ConfigError` for anything else."""
        try:
            return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in data.items()})
        except TypeError as error:
            raise ConfigError(f"these settings are not of this version: {error}.") from error

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """One argument for each option, under the headings of their groups."""
        hints, groups = typing.get_type_hints(cls), {group.title: group for group in parser._action_groups}
        taken = [(field, spec) for field, spec in _declared(cls) if spec.flag != ""]
        titles = dict.fromkeys(spec.group for _, spec in taken if spec.group is not None and spec.group not in groups)
        for title in sorted(titles, key=_LAST.__contains__):
            groups[title] = parser.add_argument_group(title)
        for field, spec in taken:
            place: argparse._ActionsContainer = parser if spec.group is None else groups[spec.group]
            told = _argument(field.default, spec, hints[field.name])
            place.add_argument(spec.flag or flag(field.name), dest=field.name, **told)

    @classmethod
    def from_arguments(cls, args: argparse.Namespace, **more: Any) -> Self:
        """The options that a command was given; ``more``: those that are worked out from several arguments.

        Raises:
            ConfigError: a value that cannot work.
        """
        for field, spec in _declared(cls):
            value = None if spec.flag == "" else getattr(args, field.name)
            if value is not None:
                value = tuple(value) if spec.repeated else value
                more.setdefault(field.name, value if spec.parse is None else spec.parse(value))
        return cls(**more)


def _declared(cls: type[Options]) -> Iterator[tuple[dataclasses.Field[Any], Spec]]:
    for field in dataclasses.fields(cls):
        yield field, field.metadata["spec"]


def _argument(default: Any, spec: Spec, hint: Any) -> dict[str, Any]:
    """What argparse is told of an option. What is not given is None there: the class knows the defaults."""
    kinds, help = (hint, *typing.get_args(hint)), spec.help
    shown = default if spec.shown is None else spec.shown
    if bool in kinds:
        action = "store_true" if default is False else argparse.BooleanOptionalAction
        more = " (default: on)" if default is True else ""
        return {"action": action, "default": None, "help": (help + more).replace("%", "%%")}
    if shown not in (None, "") and "default" not in help:
        help += f" (default: {shown})" if help else f"default: {shown}"
    found: dict[str, Any] = {
        "help": help.replace("%", "%%"),
        "metavar": spec.metavar or "|".join(spec.choices or ("N",)),
    }
    if isinstance(spec.metavar, tuple):
        found["nargs"] = len(spec.metavar)
    kind = next((kind for kind in (int, float) if kind in kinds and spec.parse is None), str)
    return found | ({"action": "append"} if spec.repeated else {"type": kind})


def flag(name: str) -> str:
    """``batch_size`` -> ``--batch-size``."""
    return "--" + name.replace("_", "-")


def at_least(lowest: float, **given: float | None) -> None:
    """Raises :class:`ConfigError` for an option below ``lowest`` or not finite; None is an option that is not given."""
    for name, value in given.items():
        if value is not None and not lowest <= value < math.inf:
            what = "an integer" if isinstance(value, int) else "a finite number"
            raise ConfigError(f"{flag(name)} {value}: give {what} of at least {lowest}.")


def one_of(allowed: Iterable[str], **given: str) -> None:
    """Raises :class:`ConfigError` for an option that is none of the ``allowed`` ones."""
    names = tuple(allowed)
    for name, value in given.items():
        if value not in names:
            raise ConfigError(f"{flag(name)}: " + unknown_name("value", value, names))
