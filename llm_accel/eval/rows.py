"""Rows of a JSON file, of JSON lines, of CSV, or of a ``datasets`` dataset; and the word lists of the package."""

from __future__ import annotations

import csv
import importlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_accel.errors import ConfigError

FORMS = "a .jsonl or .json file, or a dataset NAME|DIR[,split=test,config=NAME]"
SUFFIXES = (".json", ".jsonl")


def read_rows(source: str, option: str, split: str = "test") -> Iterator[Any]:
    """Rows of what ``option`` was given; a row with a list of rows as its ``data`` (SQuAD's file) stands for these.
    Raises :class:`ConfigError`: the source cannot be read, or needs a package that is not installed."""
    path = Path(source).expanduser()
    if path.is_file() or path.suffix in SUFFIXES:
        return read_file(path, option)
    return DatasetSource.parse(source, option, FORMS, split=split).rows()


def read_file(path: Path, option: str, forms: str = FORMS) -> Iterator[Any]:
    """Rows of a file as :func:`read_rows` gives them, those of a ``.csv`` file by the names in its first line;
    ``forms``: what ``option`` takes, for the error."""
    if not path.is_file():
        raise ConfigError(f"{option} {str(path)!r}: no such file; give {forms}.")
    try:
        rows = _parse(path.read_text(encoding="utf-8-sig"), path.suffix == ".csv")
    except (OSError, ValueError, csv.Error) as error:
        kind = "CSV" if path.suffix == ".csv" else "JSON lines"
        raise ConfigError(f"{option} {str(path)!r} cannot be read as {kind}: {error}.") from error
    for row in rows:
        yield from row["data"] if isinstance(row, dict) and isinstance(row.get("data"), list) else (row,)


def _parse(text: str, is_csv: bool) -> list[Any]:
    if is_csv:
        return list(csv.DictReader(text.splitlines(keepends=True), restkey="(no name)", restval="", strict=True))
    if text.lstrip().startswith("["):
        rows: list[Any] = json.loads(text)
        return rows
    return [json.loads(line) for line in text.splitlines() if line]


def read_word_lists(file: Path) -> dict[str, str]:
    """The lists of a file of the package: lines ``name: words``, continued on lines that begin with a space."""
    lines = file.read_text(encoding="utf-8").replace("\n ", " ").splitlines()
    return {name: words.strip() for name, _, words in (line.partition(":") for line in lines)}


@dataclass(frozen=True)
class DatasetSource:
    """A dataset that an option names: ``NAME[,split=test,config=NAME]``."""

    given: str  # what the option was given
    option: str  # its name
    name: str  # the dataset, a name on the hub or a folder
    options: Mapping[str, str]  # the split, the configuration (may be empty), and what else the option takes

    @classmethod
    def parse(cls, given: str, option: str, forms: str, **defaults: str) -> DatasetSource:
        """Raises :class:`ConfigError` where a part has no such name. ``forms``: what the option takes, for the error;
        ``defaults``: parts that may follow the name, ``config`` aside."""
        name, *pairs = given.removeprefix("dataset:").split(",")
        options = {**defaults, "config": ""}
        for pair in pairs:
            key, equals, value = pair.partition("=")
            if not equals or key not in options:
                names = ", ".join(f"{option}=" for option in options)
                raise ConfigError(f"{option} {given!r}: {pair!r} is not one of {names}; give {forms}.")
            options[key] = value
        if not name:
            raise ConfigError(f"{option} {given!r} names no dataset; give {forms}.")
        return cls(given, option, name, options)

    def rows(self, streaming: bool = False) -> Iterator[Any]:
        """The rows; ``streaming``: without having all of them first. Raises :class:`ConfigError`: the package is
        missing, or the dataset cannot be loaded."""
        about = f"{self.option} {self.given!r}"
        try:
            datasets: Any = importlib.import_module("datasets")
        except ImportError as error:
            raise ConfigError(f"{about} needs the package 'datasets': pip install 'llm_accel[eval]'.") from error
        config, split = self.options["config"] or None, self.options["split"]
        try:
            yield from datasets.load_dataset(self.name, config, split=split, streaming=streaming)
        except Exception as error:  # the loader raises many kinds: missing, gated, offline, no such split
            raise ConfigError(f"{about} cannot be loaded: {error}") from error
