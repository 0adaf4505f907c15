"""Fixed caches that nobody uses at the moment."""

from __future__ import annotations

import threading
from collections.abc import Hashable

from llm_accel.patches.compiled.cache import FixedCache, Lease

IDLE = 2**30  # bytes of unused buffers that are kept for later calls, beside those that came back last


class Pool:
    """Buffers go back to the call that needs the same ones, at the same addresses, as CUDA graphs like it. Those that
    have waited longest are let go."""

    def __init__(self) -> None:
        self._idle: list[tuple[Hashable, FixedCache]] = []
        self._lock = threading.Lock()

    def take(self, key: Hashable) -> FixedCache | None:
        """A cache of this kind, for the caller alone, or None."""
        with self._lock:
            place = next((index for index, (kind, _) in enumerate(self._idle) if kind == key), None)
            return None if place is None else self._idle.pop(place)[1]

    def put(self, lease: Lease) -> None:
        """Takes the cache of a lease back."""
        with self._lock:
            self._idle.append((lease.key, lease.cache))
            older = self._idle[:-1]
            while sum(one.nbytes() for _, one in older) > IDLE:
                older.pop(0)
            self._idle[:-1] = older
