"""The bounded queue, and which requests share a batch."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from llm_accel.serve.errors import ApiError, shutting_down
from llm_accel.serve.sequences import Job
from llm_accel.serve.settings import ServeSettings


class Scheduler:
    """First come, first served; others with the same method join the batch, nearest in length: every row of a batch
    is padded to the longest one. Safe in several threads.

    Attributes:
        batch_seconds: how long a batch takes, a running mean kept by the worker.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self.batch_seconds = 0.0
        self._settings = settings
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._reading = 0

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def closed(self) -> bool:
        """Whether it takes no more requests."""
        return self._closed

    @contextmanager
    def reserve(self) -> Iterator[None]:
        """A place in the queue for a request whose prompt is still to be read: reading costs time too.

        Raises:
            ApiError: queue_full or shutting_down.
        """
        with self._changed:
            self._check(len(self._jobs) + self._reading)
            self._reading += 1
        try:
            yield
        finally:
            with self._changed:
                self._reading -= 1

    def put(self, job: Job) -> None:
        """Accepts a request, or raises :class:`ApiError`: queue_full or shutting_down."""
        with self._changed:
            self._check(len(self._jobs))
            job.accepted_at = time.monotonic()
            self._jobs.append(job)
            self._changed.notify_all()

    def _check(self, waiting: int) -> None:
        """Whether there is a place behind so many."""
        if self._closed:
            raise shutting_down()
        if waiting < self._settings.max_queue:
            return
        seconds = max(1, math.ceil((1 + waiting / self._settings.max_batch) * self.batch_seconds))
        raise ApiError(
            "queue_full",
            f"{waiting} requests are waiting, which is all that may; try again in {seconds} s.",
            {"Retry-After": str(seconds)},
        )

    def put_back(self, jobs: Sequence[Job]) -> None:
        """Takes back those of whose prompts some have not run yet, behind all that wait."""
        with self._changed:
            self._jobs.extend(job for job in jobs if job.waiting)

    def discard(self, job: Job) -> None:
        """Takes out a request that nobody waits for; nothing happens when it has left the queue."""
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)
                self._changed.notify_all()

    def close(self) -> None:
        """No more requests; those that wait are still served."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def clear(self) -> list[Job]:
        """Closes, and gives back all that wait."""
        with self._changed:
            self._closed = True
            jobs = list(self._jobs)
            self._jobs.clear()
            self._changed.notify_all()
            return jobs

    def take(self) -> list[Job]:
        """Waits for the next batch; empty once the queue is closed and nothing waits."""
        with self._changed:
            while True:
                if not self._jobs:
                    if self._closed:
                        return []
                    self._changed.wait()
                    continue
                batch = self._batch_of(self._jobs[0])
                left = self._jobs[0].accepted_at + self._settings.window_ms / 1e3 - time.monotonic()
                if self._closed or left <= 0 or not self._open(batch):
                    for job in batch:
                        self._jobs.remove(job)
                    return batch
                self._changed.wait(left)

    def _open(self, batch: list[Job]) -> bool:
        """Whether waiting may bring more rows."""
        return not batch[0].alone and sum(len(job.waiting) for job in batch) < self._settings.max_batch

    def _batch_of(self, head: Job) -> list[Job]:
        """The first request and those behind it that share its batch, nearest in length first."""
        batch, rows, width = [head], len(head.waiting), head.width
        if head.alone:
            return batch
        for job in sorted(list(self._jobs)[1:], key=lambda job: abs(job.width - head.width)):
            more, wider = rows + len(job.waiting), max(width, job.width)
            fits = more <= self._settings.max_batch and more * wider <= self._settings.max_batch_tokens
            if not job.alone and job.methods == head.methods and fits:
                batch.append(job)
                rows, width = more, wider
        return batch
