"""The one text form of a method, ``name:option=value,...``, or of several, joined by ``+``."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from llm_accel.errors import ConfigError, UnknownMethodError, unknown_name
from llm_accel.methods import Dense, MethodConfig, list_methods, method_class
from llm_accel.methods.base import option_names, to_text


def configure(method: str | MethodConfig, options: dict[str, Any]) -> MethodConfig:
    """One method as a configuration: a name with options, or a configuration object or specification with its own."""
    if not isinstance(method, MethodConfig | str):
        raise ConfigError(
            f"method={method!r} is a {type(method).__name__}; give a method name ({', '.join(list_methods())}), "
            "a configuration object, or a list of either."
        )
    if isinstance(method, str) and ":" not in method:
        return method_class(method)(**options)
    config = method if isinstance(method, MethodConfig) else _parse_one(method, list_methods(), {})
    if options:
        kind, given = type(config).__name__, ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise ConfigError(f"{given}: {config.spec()!r} has options of its own; give them there, as in {kind}({given}).")
    return config


def configure_all(methods: Sequence[str | MethodConfig], options: dict[str, Any]) -> list[MethodConfig]:
    """Methods to apply together; ``options`` belong to a single one."""
    if len(methods) == 1 or not options:
        return [configure(method, options) for method in methods]
    kinds = [type(configure(method, {})) for method in methods] or [method_class("snapkv")]
    key, value = next(iter(options.items()))
    kind = next((kind for kind in kinds if key in option_names(kind)), kinds[0])
    raise ConfigError(
        f"options ({', '.join(options)}) apply to a single method; with several, give "
        f'`{kind.__name__}({key}={value!r})` or "{kind.name}:{key}={to_text(value)}".'
    )


def parse(spec: str) -> MethodConfig | None:
    """``snapkv:budget=1024,window=32`` as a configuration; None for ``dense`` without options, the model without a
    plug-in."""
    configs = parse_all(spec)
    if len(configs) > 1:
        raise ConfigError(f"method {spec!r} joins {len(configs)} methods; give one.")
    return configs[0] if configs else None


def parse_all(spec: str, more: Mapping[str, type[MethodConfig]] | None = None) -> tuple[MethodConfig, ...]:
    """``flowcut:budget=64+dyvte:exit=20`` as configurations to apply together; none for ``dense`` without options, the
    model without a plug-in.

    Args:
        more: methods that are known to the caller only, name -> configuration class.
    """
    more = more or {}
    names = [*list_methods(), *more]
    # a tuple among the options is written with + too, but none of its items is a method or has options
    parts = re.split(rf"\+(?=\s*(?:[a-z]\w*\s*:|(?:{'|'.join(map(re.escape, names))})\s*(?:\+|$)))", spec)
    if len(parts) > 1:
        names.remove(Dense.name)  # it is the model alone
    configs = tuple(_parse_one(part, names, more) for part in parts)
    return () if configs == (Dense(),) else configs


def spec_of(configs: Sequence[MethodConfig]) -> str:
    """The text form of what :func:`parse_all` returns, options that equal their defaults left out."""
    return "+".join(config.spec() for config in configs) or Dense.name


def _parse_one(spec: str, names: Collection[str], more: Mapping[str, type[MethodConfig]]) -> MethodConfig:
    name, _, rest = (part.strip() for part in spec.partition(":"))
    if name not in names:
        raise UnknownMethodError(unknown_name("method", name, names))
    options: dict[str, str] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = (text.strip() for text in part.partition("="))
        if not equals:
            raise ConfigError(f"method {spec!r}: {part!r} is not of the form option=value.")
        if key in options:
            raise ConfigError(f"method {spec!r}: {key} was given twice; give it once.")
        options[key] = value
    return (more[name] if name in more else method_class(name)).parse(options)
