"""The result as it grows: one JSON object per line, each on disk before the next thing begins."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

BEGIN, END, LINE = "begin", "end", "line"  # of a case; a line is a measurement on the way


class Journal:
    """Appends to ``path``, as other processes do that take turns with this one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, item: str, event: str, **fields: Any) -> None:
        """Adds one line, with the time; it survives whatever happens next."""
        record = {"item": item, "event": event, "time": round(time.time(), 3), **fields}
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, (json.dumps(record, default=str) + "\n").encode())  # whole, or not at all
            os.fsync(file)
        finally:
            os.close(file)

    def records(self) -> list[dict[str, Any]]:
        """Everything so far."""
        return Tail(self.path, 0).new()


class Tail:
    """What is added to a journal from ``offset`` on; by default, after this was made."""

    def __init__(self, path: Path, offset: int | None = None) -> None:
        self._path = path
        self._offset = (path.stat().st_size if path.exists() else 0) if offset is None else offset

    def new(self) -> list[dict[str, Any]]:
        """Records since the last call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]
