"""The bounded queue, and whose turn it is."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress

from llm_accel.serve.errors import ApiError, shutting_down
from llm_accel.serve.sequences import Job, TokenSequence
from llm_accel.serve.settings import ServeSettings


class Scheduler:
    """First come, first served. A request of more rows than are free goes to the end of the queue with the others, so
    that a long list of prompts holds nobody up. Safe in several threads.

    Attributes:
        closed: whether it takes no more requests.
        row_seconds: how long a row takes from its first step to its end, a running mean kept by the worker.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self.closed, self.row_seconds = False, 0.0
        self._settings = settings
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._reading = 0
        self._latest: Job | None = None

    def __len__(self) -> int:
        return len(self._jobs)

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
        if self.closed:
            raise shutting_down()
        if waiting < self._settings.max_queue:
            return
        seconds = max(1, math.ceil((1 + waiting / self._settings.max_batch) * self.row_seconds))
        raise ApiError(
            "queue_full",
            f"{waiting} requests are waiting, which is all that may; try again in {seconds} s.",
            {"Retry-After": str(seconds)},
        )

    def discard(self, job: Job) -> None:
        """Takes out a request that nobody waits for; nothing happens when it has left the queue."""
        with self._changed, suppress(ValueError):
            self._jobs.remove(job)

    def close(self) -> None:
        """No more requests; those that wait are still served."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    def clear(self) -> list[Job]:
        """Closes, and gives back all that wait."""
        with self._changed:
            self.close()
            jobs, self._jobs = list(self._jobs), deque()
            return jobs

    def wait(self) -> bool:
        """Waits for a request; False once the queue is closed and nothing waits."""
        with self._changed:
            self._changed.wait_for(lambda: self.closed or self._jobs)
            return bool(self._jobs)

    def head(self, busy: Collection[object] = ()) -> Job | None:
        """Whose turn it is: the first one whose session is not ``busy``; who had the last turn, and wants more, goes
        behind all that have come since."""
        with self._changed:
            if self._jobs and self._jobs[0] is self._latest:
                self._jobs.rotate(-1)
            return next((job for job in self._jobs if job.session not in busy), None)

    def take(self, head: Job, most: int, fits: Callable[[Sequence[TokenSequence]], bool]) -> list[TokenSequence]:
        """Rows of ``head`` and of requests behind it with the same method whose prompts are read together, ``most`` of
        them, while all that are taken fit; none once ``head`` has left the queue."""
        with self._changed:
            if head not in self._jobs:
                return []
            taken: list[TokenSequence] = []
            for job in [head, *self._jobs]:
                if job is not head and (job.methods != head.methods or job.apart or head.apart):
                    continue
                for row in job.waiting:
                    if len(taken) == most or not fits([*taken, row]):
                        break
                    taken.append(row)
                    job.started += 1
            self._jobs = deque(job for job in self._jobs if job.waiting)
            self._latest = head
            return taken
