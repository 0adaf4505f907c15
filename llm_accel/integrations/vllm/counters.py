"""What an engine has freed, from the process that schedules to the one that answers `/metrics`.

vLLM carries statistics of its own kinds alone between the two, so the counts stand in a small file of their machine,
whose name begins with what the process that starts all others puts into the environment. Only engines with a KV method
make one, and none fails because of its counts. Who reads it removes its name: a server that is killed leaves nothing.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import struct
import tempfile
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from multiprocessing.util import Finalize
from pathlib import Path

from llm_accel.integrations.vllm.counts import Counts, Labels

logger = logging.getLogger("vllm.llm_accel")
SHARED = "PROMETHEUS_MULTIPROC_DIR"
"""Where several API servers answer: Prometheus' own files in this folder go to all of them, ours to none."""
_RUN = "LLM_ACCEL_VLLM_RUN"
_FORMAT = struct.Struct("<qqq")


def name_run() -> None:
    """Gives this process and those that it will start a name in common, unless they have one."""
    os.environ.setdefault(_RUN, secrets.token_hex(8))


def files() -> list[Path]:
    """The files of the engines that this process or one before it has started, as far as nobody has read them."""
    return sorted(Path(tempfile.gettempdir()).glob(f"{_prefix()}*"))


def _prefix() -> str:
    return f"llm_accel-vllm-{os.environ.get(_RUN, os.getpid())}-"


class Counters:
    """The counts of one engine in the process that schedules; all of its groups of layers add to them."""

    def __init__(self, labels: Labels) -> None:
        self.labels, self._counts = labels, Counts()
        self._file = _made(labels)
        self._show()

    def add(self, blocks: int, size: int) -> None:
        """Counts freed blocks of ``size`` bytes each, in all layers of all workers."""
        before = self._counts
        self._counts = Counts(before.blocks + blocks, before.size + blocks * size, before.running)
        self._show()

    def run(self, requests: int) -> None:
        """Notes how many requests hold blocks."""
        if requests != self._counts.running:
            self._counts = Counts(self._counts.blocks, self._counts.size, requests)
            self._show()

    def _show(self) -> None:
        if os.environ.get(SHARED):
            from llm_accel.integrations.vllm.gauges import set_gauges

            set_gauges(self.labels, self._counts)
        elif self._file is not None:
            os.pwrite(self._file, _FORMAT.pack(*asdict(self._counts).values()), 0)


@cache
def counters(labels: Labels) -> Counters:
    """The counters of an engine that schedules in this process."""
    return Counters(labels)


def _made(labels: Labels) -> int | None:
    """A new file with the labels behind the counts, removed when this process ends."""
    if os.environ.get(SHARED):
        return None
    path = Path(tempfile.gettempdir()) / f"{_prefix()}{labels.engine}-{secrets.token_hex(4)}"
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        os.pwrite(file, json.dumps(asdict(labels)).encode(), _FORMAT.size)
    except OSError as error:
        logger.warning("llm_accel: /metrics will not show freed blocks, for %s cannot be written: %s", path, error)
        return None
    # a process of multiprocessing ends without what `atexit` knows
    Finalize(None, path.unlink, kwargs={"missing_ok": True}, exitpriority=0)
    return file


class Reader:
    """The counts in one of :func:`files`, for any process of the machine; from here on the file has no name.

    Raises:
        OSError: it is gone, or no file of this user's.
    """

    def __init__(self, path: Path) -> None:
        self._file: int | None = None
        self._file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        if os.fstat(self._file).st_uid != os.getuid():
            raise PermissionError(f"{path} belongs to another user")
        with suppress(OSError):
            path.unlink()
        self.labels = Labels(**json.loads(os.pread(self._file, 2**16, _FORMAT.size)))

    def read(self) -> Counts:
        """The newest counts."""
        assert self._file is not None
        return Counts(*_FORMAT.unpack(os.pread(self._file, _FORMAT.size, 0)))

    def __del__(self) -> None:
        if self._file is not None:
            os.close(self._file)
