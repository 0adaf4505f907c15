"""The run directory: ``run.json``, ``cells.jsonl`` and ``summary.json``; no measurement is lost.

Records are appended one line per write, so a crash can tear at most the last line; torn lines are skipped on reading
and what they stood for is run again. Shards of one run may share a directory.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm_accel.errors import ConfigError

_MISSING = "(not set)"

Record = dict[str, Any]


@contextmanager
def reported_errors(path: Path, option: str = "--out") -> Iterator[None]:
    """An error of the file system becomes a :class:`ConfigError` that names ``option`` and its ``path``."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{option} {str(path)!r} cannot be used: {error.strerror or error}.") from error


class RunDir:
    """One directory of results.

    Attributes:
        fields: the fields that identify a record.
        plots: glob patterns of the pictures of a run.
    """

    def __init__(self, path: Path, fields: tuple[str, ...], plots: tuple[str, ...] = ()) -> None:
        self.path, self.fields, self.plots = path, fields, plots
        self.run_file, self.cells_file = path / "run.json", path / "cells.jsonl"
        self.summary_file = path / "summary.json"

    def key(self, record: Record) -> tuple[Any, ...]:
        """The key of a record."""
        return tuple(record[field] for field in self.fields)

    def open(self, settings: dict[str, Any], about: dict[str, Any], overwrite: bool = False) -> list[Record]:
        """Creates the directory or continues the run in it; returns the records that are already there.

        Args:
            settings: what must be equal for a run to continue, plain data.
            about: versions, hardware and the like, written with them.
            overwrite: start over; only files that such a run writes are removed.

        Raises:
            ConfigError: the directory holds another run (names the settings that differ), or something else.
        """
        with reported_errors(self.path):
            if self.path.exists() and not self.path.is_dir():
                raise ConfigError(f"--out {str(self.path)!r} is a file; give a directory.")
            if overwrite:
                for name in ("run.json", "cells.jsonl", "summary.json", *self.plots):
                    for file in self.path.glob(name):
                        file.unlink()
            self.path.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"settings": settings, **about}, indent=2) + "\n"
            if not self._create(text):
                self.check(settings)
        return self.records()

    def _create(self, text: str) -> bool:
        """Writes run.json whole or not at all; False where one exists already."""
        if self.run_file.exists():
            return False
        if self.cells_file.exists():
            raise ConfigError(f"--out {str(self.path)!r} holds cells.jsonl without run.json; give another directory.")
        draft = self.path / f".run.json.{os.getpid()}"
        draft.write_text(text, encoding="utf-8")
        try:
            os.link(draft, self.run_file)
        except FileExistsError:
            return False  # another shard was faster
        except OSError:  # a file system without hard links
            shutil.copyfile(draft, self.run_file)
        finally:
            draft.unlink()
        return True

    def check(self, settings: dict[str, Any]) -> None:
        """Raises :class:`ConfigError` if the run in this directory has other values for these settings."""
        try:
            found = dict(json.loads(self.run_file.read_text(encoding="utf-8"))["settings"])
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ConfigError(
                f"--out {str(self.path)!r}: run.json cannot be read as that of a run; "
                "give another directory or --overwrite."
            ) from error
        differing = [
            f"{key}: {_show(found.get(key, _MISSING))} there, {_show(value)} now"
            for key, value in settings.items()
            if found.get(key, _MISSING) != value
        ]
        if differing:
            raise ConfigError(
                f"--out {str(self.path)!r} holds a run with other settings ({'; '.join(differing)}). "
                "Give another --out, the settings of that run, or --overwrite to start over."
            )

    def about(self) -> dict[str, Any]:
        """Everything in run.json."""
        return dict(json.loads(self.run_file.read_text(encoding="utf-8")))

    def records(self) -> list[Record]:
        """All whole records, the first one of each prompt; torn lines are skipped."""
        if not self.cells_file.exists():
            return []
        found: dict[tuple[Any, ...], Record] = {}
        for line in self.cells_file.read_bytes().splitlines():
            try:
                record = json.loads(line)
                found.setdefault(self.key(record), record)
            except (ValueError, KeyError, TypeError):
                continue
        return list(found.values())

    def append(self, records: list[Record]) -> None:
        """Adds whole lines in one write and hands them to the disk."""
        text = "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in records)
        with open(self.cells_file, "a+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":  # a crash tore the last line: keep it apart from ours
                    text = "\n" + text
            file.write(text.encode())
            os.fsync(file.fileno())

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Replaces summary.json in one step."""
        draft = self.path / f".summary.json.{os.getpid()}"
        draft.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        os.replace(draft, self.summary_file)


def _show(value: Any) -> str:
    return value if value == _MISSING else json.dumps(value)
