"""What an engine has freed, from the process that schedules to the one that answers `/metrics`.

vLLM carries statistics of its own kinds alone between the two, so the counts stand in a small file of their machine,
whose name the process that starts all others puts into the environment. Whoever cannot open it does without: no engine
fails because of its counts. The first who reads removes the name, so that nothing stays of a server that is killed;
where several API servers read, vLLM has a folder for the metrics of all of them, and removes that.
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
from multiprocessing import util
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
        self._blocks = 0
        self._file: int | None = None
        path = path_of(engine)
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            logger.warning("llm_accel: freed blocks will not be seen in /metrics: %s", error)
        else:
            util.Finalize(None, _remove, args=(path, os.getpid()), exitpriority=0)  # at the end of a child as well

    def add(self, blocks: int, page: int) -> None:
        """Counts freed blocks of ``page`` bytes per layer."""
        self._blocks += blocks
        if self._file is not None:
            os.pwrite(self._file, _FORMAT.pack(self._blocks, page), 0)


def _remove(path: Path, owner: int) -> None:
    if os.getpid() == owner:  # no process that was forked from it
        with suppress(OSError):
            path.unlink()


@cache
def counters(engine: int) -> Counters:
    """The counters of an engine that schedules in this process."""
    return Counters(engine)


class Reader:
    """The counts of one engine, read in any process of its machine that has the name in common."""

    def __init__(self, engine: int) -> None:
        self._engine = engine
        self._file: int | None = None

    def read(self) -> Counts | None:
        """The newest counts; None where the engine has freed nothing yet, or runs on another machine."""
        if self._file is None:
            self._file = _opened(self._engine)
        written = b"" if self._file is None else os.pread(self._file, _FORMAT.size, 0)
        return Counts(*_FORMAT.unpack(written)) if len(written) == _FORMAT.size else None

    def __del__(self) -> None:
        if self._file is not None:
            os.close(self._file)


def _opened(engine: int) -> int | None:
    path = path_of(engine)
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    if os.fstat(file).st_uid == os.getuid():
        if not os.environ.get(_SHARED):
            path.unlink()
        return file
    os.close(file)
    return None
