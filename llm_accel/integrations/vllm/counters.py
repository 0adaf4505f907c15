"""What an engine has freed, from the process that schedules to the one that answers `/metrics`.

vLLM carries statistics of its own kinds alone between the two, so the counts stand in a small file of their machine,
whose name the process that starts all others puts into the environment. Who shows the counts makes the file; engines
that nobody asks for theirs have none, and no engine fails because of its counts. Once there are counts the name is
removed, so that nothing stays of a server that is killed; where several API servers read, vLLM has a folder for the
metrics of all of them, and removes that.
"""

from __future__ import annotations

import logging
import os
import secrets
import struct
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

logger = logging.getLogger("vllm.llm_accel")
_FORMAT = struct.Struct("<qq")
_SHARED = "PROMETHEUS_MULTIPROC_DIR"
_RUN = "LLM_ACCEL_VLLM_RUN"


@dataclass(frozen=True)
class Counts:
    """Since the start of an engine.

    Attributes:
        blocks: blocks that were freed before their request had ended.
        page: bytes of one block in one layer of one worker.
    """

    blocks: int
    page: int


def name_run() -> None:
    """Gives this process and those that it will start a name in common, unless they have one."""
    os.environ.setdefault(_RUN, secrets.token_hex(8))


def path_of(engine: int) -> Path:
    """The file of an engine, by its data-parallel index."""
    folder = Path(os.environ.get(_SHARED) or tempfile.gettempdir())
    return folder / f"llm_accel-vllm-{os.environ.get(_RUN, os.getpid())}-{engine}"


class Counters:
    """The counts of one engine in the process that schedules; all of its groups of layers add to them."""

    def __init__(self, engine: int) -> None:
        self._engine, self._blocks = engine, 0
        self._file: int | None = None

    def add(self, blocks: int, page: int) -> None:
        """Counts freed blocks of ``page`` bytes per layer."""
        self._blocks += blocks
        if self._file is None:
            self._file = _opened(self._engine, os.O_RDWR)
        if self._file is not None:
            os.pwrite(self._file, _FORMAT.pack(self._blocks, page), 0)


@cache
def counters(engine: int) -> Counters:
    """The counters of an engine that schedules in this process."""
    return Counters(engine)


class Reader:
    """The counts of one engine, for any process of its machine that has the name in common."""

    def __init__(self, engine: int) -> None:
        self._path = path_of(engine)
        self._shared = bool(os.environ.get(_SHARED))
        with suppress(OSError):
            if not self._shared:
                self._path.unlink(missing_ok=True)  # that of an engine before, which has freed nothing
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        self._file = _opened(engine, os.O_RDONLY)
        if self._file is None:
            logger.warning("llm_accel: %s cannot be made, so /metrics will not show freed blocks", self._path)

    def read(self) -> Counts | None:
        """The newest counts; None where the engine has freed nothing yet, or runs on another machine."""
        written = b"" if self._file is None else os.pread(self._file, _FORMAT.size, 0)
        if len(written) != _FORMAT.size:
            return None
        if not self._shared:
            self._path.unlink(missing_ok=True)
        return Counts(*_FORMAT.unpack(written))

    def __del__(self) -> None:
        file: int | None = getattr(self, "_file", None)
        if file is not None:
            os.close(file)


def _opened(engine: int, how: int) -> int | None:
    """A file of this user's; None where there is none."""
    try:
        file = os.open(path_of(engine), how | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    if os.fstat(file).st_uid == os.getuid():
        return file
    os.close(file)
    return None
