"""What every method configuration shares: options with help, validation, and the line in the method table."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from llm_accel.errors import ConfigError, unknown_name
from llm_accel.methods.claims import Claim

ENTRIES = 2**30  # tokens, cache entries, and periods counted in them: more than any context holds
LAYERS = 4096  # layers, and layer indices: more than any model has
INT64 = 2**63 - 1  # what seeds fit in, and every integer without a bound of its own
_MOST_ITEMS = 2**16  # of a tuple
_SHOWN = 100  # characters of a value in a message


def option(
    help: str,
    default: Any,
    most: float = INT64,
    least: float | None = None,
    share: Literal["(0, 1]", "[0, 1]"] | None = None,
) -> Any:
    """A dataclass field with a one-line help, used by Python, the command line and the docs alike.

    Args:
        most: the largest magnitude of a number, or of each one in a tuple: beyond what makes sense, and before work,
            memory or integers of a tensor would run out.
        least: the smallest number that is allowed, where there is one.
        share: the interval of a number that is a share of something.
    """
    return dataclasses.field(default=default, metadata={"help": help, "most": most, "least": least, "share": share})


@dataclass(frozen=True)
class MethodInfo:
    """One row of the method table.

    Attributes:
        paper: title and arXiv number.
        cuts: what the method makes smaller, in a few words.
        needs_query: whether quality rests on the question being part of the compressed prompt.
        frees_memory: whether fewer bytes are held afterwards.
        kinds: the kinds of model it works on: "text", "vision".
    """

    paper: str
    cuts: str
    needs_query: bool = False
    frees_memory: bool = True
    kinds: tuple[str, ...] = ("text", "vision")


@dataclass(frozen=True)
class MethodConfig:
    """Base of all method configurations: immutable, validated on construction, comparable, picklable."""

    name: ClassVar[str]
    info: ClassVar[MethodInfo]
    renamed: ClassVar[Mapping[str, str]] = {}  # names that options had before -> their names

    def __new__(cls, *args: Any, **options: Any) -> Self:
        allowed = option_names(cls)
        for key in options:
            if key in cls.renamed:
                raise ConfigError(f"{cls.name}: the option {key!r} is now called {cls.renamed[key]!r}.")
            if key not in allowed:
                raise ConfigError(f"{cls.name}: " + unknown_name("option", key, allowed))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = _as_tuples(getattr(self, field.name))  # JSON knows lists only
            object.__setattr__(self, field.name, value)
            if not _fits(value, hints[field.name]):
                self.fail(field.name, _described(hints[field.name]))
            if type(value) is int and float in _alternatives(hints[field.name]):
                object.__setattr__(self, field.name, float(value))  # ratio=1 and ratio=1.0 have one text form
            self._check_bounds(field, hints[field.name])
            self._check_size(field.name, value, field.metadata.get("most", INT64))
        self.validate()

    def validate(self) -> None:
        """Checks that involve values; raises :class:`ConfigError`."""

    @property
    def claims(self) -> Mapping[Claim, str]:
        """What the method decides alone, so that no other one with the same claim can be applied with it. The text goes
        on from the method's name in a message, {other} being the other method; empty: both do what the claim says."""
        return {}

    @property
    def cautions(self) -> tuple[str, ...]:
        """What a user should know of options that are allowed and rarely wise; each stands in the report as a
        warning."""
        return ()

    def fail(self, field: str, allowed: str) -> typing.NoReturn:
        """Raises the error for one option: what was given and what is allowed."""
        raise ConfigError(f"{self.name}: {field}={_shown(getattr(self, field))} is not allowed; give {allowed}.")

    def at_most_one(self, *names: str) -> None:
        """Refuses options of which only one can be given; None is an option that is not given."""
        given = [f"{name}={getattr(self, name)!r}" for name in names if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"{self.name}: {' and '.join(given)} were given together; give one of them.")

    def _check_size(self, field: str, value: Any, most: float) -> None:
        if isinstance(value, tuple) and len(value) > _MOST_ITEMS:
            self.fail(field, f"at most {_MOST_ITEMS} items")
        largest = max(_numbers(value), key=abs, default=0)
        if abs(largest) > most:
            self.fail(field, f"at most {most}" if largest > 0 else f"at least {-most}")

    def _check_bounds(self, field: dataclasses.Field[Any], hint: Any) -> None:
        """A number against the bounds of its option; other values that the option takes have none."""
        value, kinds = getattr(self, field.name), _alternatives(hint)
        least, share = field.metadata.get("least"), field.metadata.get("share")
        if isinstance(value, bool) or not isinstance(value, int | float):
            return
        others = "".join(f", or {_described(kind)}" for kind in kinds if kind not in (int, float))
        if least is not None and value < least:
            self.fail(field.name, f"{'a number' if float in kinds else 'an integer'} of at least {least}{others}")
        if share is not None and not (0 <= value <= 1 and (value > 0 or share == "[0, 1]")):
            self.fail(field.name, f"a number in {share}{others}")

    @classmethod
    def parse(cls, options: dict[str, str]) -> Self:
        """A configuration from text, as the command line gives it (``budget=1024,pool=max``)."""
        return cls(**cls.typed(options))

    @classmethod
    def typed(cls, options: dict[str, str]) -> dict[str, Any]:
        """Options from text, each with the type of its field; unknown ones are left as they are."""
        hints, allowed = typing.get_type_hints(cls), option_names(cls)
        return {
            key: _from_text(cls.name, key, text, hints[key]) if key in allowed else text
            for key, text in options.items()
        }

    def changed(self) -> dict[str, Any]:
        """The options that differ from their defaults, in field order."""
        pairs = ((field, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {field.name: value for field, value in pairs if value != field.default}

    def spec(self) -> str:
        """The configuration in the form of the command line, for example ``snapkv:budget=128``."""
        options = ",".join(f"{key}={to_text(value)}" for key, value in self.changed().items())
        return f"{self.name}:{options}" if options else self.name


def option_names(cls: type[MethodConfig]) -> frozenset[str]:
    """Names of the options of a method."""
    return frozenset(field.name for field in dataclasses.fields(cls))


def _alternatives(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _fits(value: Any, hint: Any) -> bool:
    for kind in _alternatives(hint):
        if kind is type(None):
            matched = value is None
        elif kind is bool:
            matched = isinstance(value, bool)
        elif kind is int:
            matched = isinstance(value, int) and not isinstance(value, bool)
        elif kind is float:
            matched = isinstance(value, int | float) and not isinstance(value, bool) and _finite(value)
        elif typing.get_origin(kind) is tuple:
            hints = _items(kind, len(value)) if isinstance(value, tuple) else ()
            matched = isinstance(value, tuple) and len(hints) == len(value) and all(map(_fits, value, hints))
        elif typing.get_origin(kind) is typing.Literal:
            matched = value in typing.get_args(kind)
        else:
            matched = isinstance(value, kind)
        if matched:
            return True
    return False


def _shown(value: Any) -> str:
    """A value in a message, however long it is."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integers of thousands of digits
        text = f"(an integer of {value.bit_length()} bits)" if isinstance(value, int) else "(a tuple of huge integers)"
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _numbers(value: Any) -> Iterator[float]:
    """The numbers of an option; those of each item of a tuple."""
    if isinstance(value, tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list | tuple) else value


def _items(kind: Any, count: int) -> tuple[Any, ...]:
    """The hints of a tuple's items: those of ``tuple[int, str]``, or ``count`` times that of ``tuple[int, ...]``."""
    hints = typing.get_args(kind)
    return hints[:1] * count if hints[-1] is Ellipsis else hints


def _finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False


_WORDS = {int: "an integer", float: "a finite number", bool: "true or false", str: "a text", type(None): "None"}


def _described(hint: Any) -> str:
    """The allowed values in words."""
    names = []
    for kind in _alternatives(hint):
        if typing.get_origin(kind) is typing.Literal:
            names.append(" or ".join(repr(choice) for choice in typing.get_args(kind)))
        elif typing.get_origin(kind) is tuple:
            items = [_described(item) for item in _items(kind, 1)]
            names.append(f"a tuple, each item {items[0]}" if len(items) == 1 else f"a tuple ({', '.join(items)})")
        else:
            names.append(_WORDS.get(kind, f"a {kind.__name__}"))
    return " or ".join(names)


def _from_text(method: str, key: str, text: str, hint: Any) -> Any:
    for kind in _alternatives(hint):
        if kind is type(None) and text.lower() == "none":
            return None
        if kind is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
        if kind is str or (typing.get_origin(kind) is typing.Literal and text in typing.get_args(kind)):
            return text
        if typing.get_origin(kind) is tuple:
            several = typing.get_args(kind)[-1] is Ellipsis
            parts = [part for part in text.split("+") if part] if several else text.split(":")
            hints = _items(kind, len(parts))
            if len(hints) == len(parts):
                return tuple(_from_text(method, key, part, item) for part, item in zip(parts, hints, strict=True))
    raise ConfigError(f"{method}: {key}={_shown(text)} is not allowed; give {_described(hint)}.")


def to_text(value: Any) -> str:
    """A value as the command line writes it: ``0+1``, and ``256:None:4+8:2048:1`` for a tuple of tuples."""
    if isinstance(value, tuple):
        return "+".join(":".join(map(str, item)) if isinstance(item, tuple) else str(item) for item in value)
    return str(value)
