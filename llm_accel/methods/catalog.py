"""The methods known by name: those of this package, classes that were registered, and those of installed packages."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import TypeVar

from llm_accel.errors import ConfigError, UnknownMethodError, unknown_name
from llm_accel.methods.base import MethodConfig, MethodInfo

GROUP = "llm_accel.methods"  # of the entry points: name of the method = module:class
_Method = TypeVar("_Method", bound=MethodConfig)
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_registered: dict[str, type[MethodConfig]] = {}


class _Catalog(Mapping[str, type[MethodConfig]]):
    """Imports the package of a method when its class is asked for, not when names are."""

    def __getitem__(self, name: str) -> type[MethodConfig]:
        points = _declared().get(name, ())
        _refuse_clash(name, points)
        if name not in _registered and points:
            _registered[name] = _load(points[0])
        return _registered[name]

    def __contains__(self, name: object) -> bool:
        return name in _registered or name in _declared()

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*_registered, *_declared())))

    def __len__(self) -> int:
        return len({*_registered, *_declared()})


_CATALOG = _Catalog()


def list_methods() -> Mapping[str, type[MethodConfig]]:
    """All methods: name -> configuration class. Its ``info`` tells paper, what it cuts, whether it needs the query
    in the prompt, whether it frees memory, and which kinds of model it works on.

    Packages that declare a method in the entry-point group ``llm_accel.methods`` are imported when their class is
    looked up; :class:`ConfigError` then says what is wrong with one that cannot be used."""
    return _CATALOG


def imported_methods() -> Mapping[str, type[MethodConfig]]:
    """The methods among :func:`list_methods` whose classes are there without importing another package."""
    return MappingProxyType(_registered)


def register_method(cls: type[_Method]) -> type[_Method]:
    """Makes a method known by its ``name`` to Python, the command line and the server; usable as a decorator.

    Raises:
        ConfigError: the class is no usable method, or its name belongs to another one.
    """
    _check(cls)
    known = _registered.get(cls.name)
    if known is not None and _place(known) != _place(cls):  # a cell of a notebook may run twice
        raise ConfigError(f"{_place(cls)} has the name {cls.name!r} of {_place(known)}; give it another.")
    _registered[cls.name] = cls
    return cls


def method_class(name: str) -> type[MethodConfig]:
    """The configuration class of a method; :class:`UnknownMethodError` lists the names, nearest first."""
    if name not in _CATALOG:
        raise UnknownMethodError(unknown_name("method", name, _CATALOG))
    return _CATALOG[name]


@cache
def _declared() -> dict[str, tuple[EntryPoint, ...]]:
    """What installed packages declare; packages that lead to the same class count once."""
    found: dict[str, dict[str, EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        found.setdefault(point.name, {}).setdefault(point.value, point)
    return {name: tuple(points.values()) for name, points in found.items()}


def _refuse_clash(name: str, points: tuple[EntryPoint, ...]) -> None:
    places = {point.value: _package(point) for point in points}
    if name in _registered:
        places.setdefault(_place(_registered[name]), _registered[name].__module__.partition(".")[0])
    if len(places) > 1:
        owners = " and ".join(f"{package} ({value})" for value, package in sorted(places.items()))
        raise ConfigError(f"method {name!r} is defined by {owners}; uninstall one of them or rename its method.")


def _load(point: EntryPoint) -> type[MethodConfig]:
    where = f"method {point.name!r} of the package {_package(point)} ({point.value})"
    try:
        cls: type[MethodConfig] = point.load()
    except Exception as error:  # whatever a third party's module does while it is imported
        problem = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{where} cannot be imported: {problem}; repair or uninstall the package.") from error
    try:
        _check(cls)
    except ConfigError as error:
        raise ConfigError(f"{where} cannot be used: {error}") from error
    if cls.name != point.name:
        raise ConfigError(f"{where} calls itself {cls.name!r}; its entry point must have the same name.")
    return cls


def _check(cls: type[MethodConfig]) -> None:
    if not (isinstance(cls, type) and issubclass(cls, MethodConfig)):
        raise ConfigError(f"{cls!r} is no method; give a class derived from a role such as PromptCompression.")
    place, name = _place(cls), getattr(cls, "name", None)
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise ConfigError(f"{place}: name={name!r} is not allowed; give lower-case letters, digits and underscores.")
    if not isinstance(getattr(cls, "info", None), MethodInfo):
        raise ConfigError(f"{place} has no `info`; give a MethodInfo, its row in the table of methods.")
    if "__dataclass_fields__" not in vars(cls):
        raise ConfigError(f"{place} is no dataclass of its own; decorate it with @dataclass(frozen=True).")
    bare = [field.name for field in dataclasses.fields(cls) if "help" not in field.metadata]
    if bare:
        raise ConfigError(f"{place}: {', '.join(bare)} must be declared as option(help, default).")
    missing = [key for key in dir(cls) if getattr(getattr(cls, key), "__isabstractmethod__", False)]
    if missing:
        raise ConfigError(f"{place} does not define {', '.join(missing)}, which methods of its role need.")


def _place(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _package(point: EntryPoint) -> str:
    return "?" if point.dist is None else f"{point.dist.name} {point.dist.version}"
