"""Method names and the one text form of a method, ``name:option=value,...``."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from llm_accel.errors import ConfigError, UnknownMethodError, unknown_name
from llm_accel.methods import ALL, MethodConfig

_BY_NAME: Mapping[str, type[MethodConfig]] = MappingProxyType({config.name: config for config in ALL})


def methods() -> Mapping[str, type[MethodConfig]]:
    """All methods: name -> configuration class. Its ``info`` tells paper, what it cuts, whether it needs the query
    in the prompt, whether it frees memory, and which kinds of model it works on."""
    return _BY_NAME


def config_class(name: str) -> type[MethodConfig]:
    """The configuration class of a method; :class:`UnknownMethodError` lists the names, nearest first."""
    if name not in _BY_NAME:
        raise UnknownMethodError(unknown_name("method", name, _BY_NAME))
    return _BY_NAME[name]


def configure(method: str | MethodConfig, options: dict[str, Any]) -> MethodConfig:
    """One method as a configuration: a name with options, or a configuration object without any."""
    if isinstance(method, MethodConfig):
        if options:
            raise ConfigError(
                f"options {sorted(options)} were given beside the configuration {method.spec()!r}; "
                "put them into the configuration object."
            )
        return method
    if not isinstance(method, str):
        raise ConfigError(
            f"method={method!r} is a {type(method).__name__}; give a method name ({', '.join(_BY_NAME)}), "
            "a configuration object, or a list of either."
        )
    return config_class(method).build(**options)


def parse(spec: str) -> MethodConfig | None:
    """``snapkv:budget=1024,window=32`` as a configuration; None for ``dense``, the model without a plug-in."""
    name, _, rest = (part.strip() for part in spec.partition(":"))
    if name == "dense":
        if rest:
            raise ConfigError(f"method {spec!r}: dense takes no options.")
        return None
    if name not in _BY_NAME:
        raise UnknownMethodError(unknown_name("method", name, (*_BY_NAME, "dense")))
    options: dict[str, str] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise ConfigError(f"method {spec!r}: {part!r} is not of the form option=value.")
        if key in options:
            raise ConfigError(f"method {spec!r}: {key} was given twice; give it once.")
        options[key] = value
    return config_class(name).parse(options)
