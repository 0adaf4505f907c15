"""The one inference thread: requests come in through :meth:`Engine.submit`, answers leave as events of their jobs."""

from __future__ import annotations

import logging
import threading
import time
import traceback

from llm_accel.errors import ConfigError, UnsupportedCallError, UnsupportedModelError
from llm_accel.registry import parse_all
from llm_accel.serve.conversations import Conversations
from llm_accel.serve.errors import ApiError, BadRequest, shutting_down
from llm_accel.serve.loading import Served
from llm_accel.serve.metrics import Metrics
from llm_accel.serve.model_runner import ModelRunner
from llm_accel.serve.scheduler import Scheduler
from llm_accel.serve.sequences import Job
from llm_accel.serve.settings import ServeSettings

log = logging.getLogger(__name__)

FAILING = 3  # failed batches in a row from which /health complains
_REFUSALS = (ConfigError, UnsupportedModelError, UnsupportedCallError)


class Engine:
    """A model behind a queue.

    Raises:
        LlmAccelError: the default method does not work on this model.
    """

    def __init__(self, served: Served, settings: ServeSettings) -> None:
        self.metrics = Metrics()
        self.scheduler = Scheduler(settings)
        conversations = Conversations(settings.max_sessions, settings.max_session_mib * 2**20)
        self._runner = ModelRunner(served.model, served.tokenizer, conversations, self.metrics, settings.decode)
        self._own = parse_all(settings.method)
        self._runner.use(self._own)
        self._failed, self._max_batch = 0, settings.max_batch
        self._running: list[Job] = []
        self._thread = threading.Thread(target=self._work, name="llm-accel-inference", daemon=True)
        self.metrics.watch("queue_depth", "Requests that wait.", lambda: len(self.scheduler))
        self.metrics.watch("running", "Requests in the running batch.", lambda: len(self._running))
        self.metrics.watch("sessions", "Conversations that keep their cache.", lambda: len(conversations))
        self.metrics.watch("session_bytes", "Bytes of their caches.", lambda: conversations.nbytes)

    @property
    def status(self) -> str:
        """ "ok", or why a load balancer should send requests elsewhere."""
        if self.scheduler.closed:
            return "shutting down"
        if not self.working:
            return "not running"
        return "failing" if self._failed >= FAILING else "ok"

    @property
    def working(self) -> bool:
        """Whether there is a thread that serves; after :meth:`drain` it ends with the last accepted request."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Accepts a request, or raises :class:`ApiError`."""
        self.scheduler.put(job)

    def cancel(self, job: Job) -> None:
        """Nobody waits for this request any more: it leaves the queue, or its rows stop at their next token."""
        job.cancelled = True
        self.scheduler.discard(job)

    def drain(self) -> None:
        """No more requests; accepted ones are finished."""
        self.scheduler.close()

    def abandon(self) -> None:
        """Fails every request that is not finished."""
        for job in [*self.scheduler.clear(), *self._running]:
            job.fail(shutting_down())

    def join(self, seconds: float) -> None:
        """Waits for the thread to end, after :meth:`drain` or :meth:`abandon`."""
        self._thread.join(seconds)

    def _work(self) -> None:
        try:
            while jobs := self.scheduler.take():
                self._serve(jobs)
        finally:
            self._runner.use(())  # whoever served the model gets it back as it was

    def _serve(self, jobs: list[Job]) -> None:
        self._running = jobs
        begin = time.monotonic()
        try:
            self._runner.run(jobs, self._max_batch)
            self.scheduler.put_back(jobs)
            self._failed = 0
        except _REFUSALS as error:
            self._fail(jobs, BadRequest(str(error)))
        except Exception as error:
            if jobs[0].methods in ((), self._own):  # what clients made of other methods says nothing about the server
                self._failed += 1
            self.metrics.failed_batches.inc()
            frames = "".join(traceback.format_tb(error.__traceback__)[-4:])
            # torch's own errors speak of memory and shapes; others may quote the prompt
            text = f": {error}" if isinstance(error, RuntimeError) else ""
            log.error("a batch of %d requests failed: %s%s\n%s", len(jobs), type(error).__name__, text, frames)
            self._fail(jobs, ApiError("error", "the model failed on this batch; the server's log says why."))
        finally:
            self._running = []
        seconds = time.monotonic() - begin
        mean = self.scheduler.batch_seconds
        self.scheduler.batch_seconds = seconds if mean == 0 else 0.8 * mean + 0.2 * seconds

    def _fail(self, jobs: list[Job], error: ApiError) -> None:
        for job in jobs:
            job.fail(error)
