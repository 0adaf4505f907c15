"""The table of all methods, for ``llm-accel methods`` and for the README. Generated from the classes only."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from llm_accel.errors import ConfigError
from llm_accel.methods import BUILT_IN, MethodConfig, list_methods
from llm_accel.methods.base import ENTRIES, INT64, to_text

_COLUMNS = ("method", "paper", "what it cuts", "question in the prompt", "frees memory", "models")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``llm-accel methods``."""
    parser.add_argument("--json", action="store_true", help="print JSON, with the options of every method")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Prints the table on stdout and returns the methods as plain data."""
    data = describe(list_methods())
    print(json.dumps(data, indent=2) if args.json else text(data))
    return data


def describe(methods: Mapping[str, type[MethodConfig]] | None = None) -> dict[str, Any]:
    """Methods as plain data: name -> paper, cuts, needs_query, frees_memory, kinds and options, or the error that keeps
    a third party's method from being used.

    Args:
        methods: name -> configuration class; None: those of this package.
    """
    methods = {cls.name: cls for cls in BUILT_IN} if methods is None else methods
    return {name: _described(methods, name) for name in methods}


def _described(methods: Mapping[str, type[MethodConfig]], name: str) -> dict[str, Any]:
    try:
        cls = methods[name]
    except ConfigError as error:
        return {"error": str(error)}
    options = {field.name: {"default": field.default, "help": _help(field)} for field in dataclasses.fields(cls)}
    return dataclasses.asdict(cls.info) | {"class": cls.__name__, "options": options}


def _help(field: dataclasses.Field[Any]) -> str:
    """What an option says of itself, and its upper bound where that is not merely the size of any context."""
    help, most = field.metadata["help"], field.metadata.get("most", INT64)
    return f"{help} (at most {most:g})" if most < ENTRIES else str(help)


def markdown() -> str:
    """The table of the README."""
    header = [f"| {' | '.join(_COLUMNS)} |", f"|{'---|' * len(_COLUMNS)}"]
    cells = [_cells(f"`{name}`", entry) for name, entry in describe().items()]
    return "\n".join(header + [f"| {' | '.join(row)} |" for row in cells])


def text(data: dict[str, Any]) -> str:
    """The table for a terminal, followed by the options of each method and by what cannot be used."""
    broken = [entry["error"] for entry in data.values() if "error" in entry]
    data = {name: entry for name, entry in data.items() if "error" not in entry}
    rows = [list(_COLUMNS)] + [_cells(name, entry) for name, entry in data.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    for name, entry in data.items():
        lines.append(f"\n{name}  ({entry['class']})")
        options = [(f"{key}={_shown(option['default'])}", option["help"]) for key, option in entry["options"].items()]
        longest = max(len(setting) for setting, _ in options)
        lines.extend(f"  {setting:<{longest}}  {help}" for setting, help in options)
    return "\n".join([*lines, *(f"\nnot usable: {error}" for error in broken)])


def _cells(name: str, entry: dict[str, Any]) -> list[str]:
    needs = "needed" if entry["needs_query"] else "not needed"
    frees = "yes" if entry["frees_memory"] else "no"
    return [name, entry["paper"], entry["cuts"], needs, frees, ", ".join(entry["kinds"])]


def _shown(default: Any) -> str:
    return to_text(default) or "()"
