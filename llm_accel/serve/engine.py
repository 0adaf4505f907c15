"""The one inference thread: requests come in through :meth:`Engine.submit`, answers leave as events of their jobs."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial

from llm_accel.common.generation import end_tokens
from llm_accel.errors import ConfigError, UnsupportedCallError, UnsupportedModelError
from llm_accel.patches.applied import AppliedMethods, Methods
from llm_accel.patches.forward import Forward
from llm_accel.patches.plan import Plan
from llm_accel.patches.rows import lengths_mix
from llm_accel.patches.running import Reading, bytes_of
from llm_accel.registry import parse_all, spec_of
from llm_accel.serve.capacity import Capacity
from llm_accel.serve.conversations import Conversation, Conversations
from llm_accel.serve.errors import ApiError, BadRequest, shutting_down
from llm_accel.serve.group import Group
from llm_accel.serve.loading import Served
from llm_accel.serve.logprobs import prompt_logprobs
from llm_accel.serve.metrics import Metrics
from llm_accel.serve.scheduler import Scheduler
from llm_accel.serve.sequences import Job, TokenSequence
from llm_accel.serve.settings import ServeSettings

log = logging.getLogger(__name__)

FAILING = 3  # failed steps in a row from which /health complains
_REFUSALS = (ConfigError, UnsupportedModelError, UnsupportedCallError)
# tokens of prompts that are read between two decode steps: enough to be worth the call, and no more
STEP_TOKENS = {"cpu": 256, "cuda": 8192}
# while no row decodes: enough for a token to cost what it costs in a whole prompt, and few enough for a request that is
# given up to end soon
IDLE_TOKENS = {"cpu": 2048, "cuda": 8192}


class Engine:
    """A model behind a queue. In each round a chunk of prompts is read, and every running row gets one token.

    Attributes:
        thread: serves from its start on; once the scheduler is closed it ends with the last accepted request.

    Raises:
        LlmAccelError: the default method does not work on this model.
    """

    def __init__(self, served: Served, settings: ServeSettings) -> None:
        self.metrics = Metrics()
        self.scheduler = Scheduler(settings)
        self._conversations = Conversations(settings.max_sessions, settings.max_session_mib * 2**20)
        self._forward = Forward(served.model)
        self._ends = end_tokens(served.model, served.tokenizer)
        self._methods = AppliedMethods(served.model, settings.decode)
        self._own = parse_all(settings.method)
        self._plans = {spec_of(methods): self._plan(methods) for methods in ((), self._own)}
        self.capacity = Capacity(served.model, settings)
        kind = served.model.device.type
        self._chunk, self._idle_chunk = (
            settings.max_step_tokens or tokens.get(kind, tokens["cuda"]) for tokens in (STEP_TOKENS, IDLE_TOKENS)
        )
        self._most, self._failed = settings.max_batch, 0
        self._reading: list[TokenSequence] = []  # rows of one method whose prompts are read together
        self._parts: Iterator[None] = iter(())
        self._groups: list[Group] = []
        self.thread = threading.Thread(target=self._work, name="llm-accel-inference", daemon=True)
        self._watch()

    def _plan(self, methods: Methods) -> Plan | None:
        return self._methods.use(methods or self._methods.plain)

    def _watch(self) -> None:
        watch, kept = self.metrics.watch, self._conversations
        watch("queue_depth", "Requests that wait.", lambda: len(self.scheduler))
        watch("running", "Rows whose prompt is read or that decode.", lambda: len(self.running))
        for method, plan in self._plans.items():
            free = partial(self._free, plan)
            watch("slots_free", "Rows of the whole context that may come now.", free, method=method)
        watch("kv_bytes", "Bytes of all running rows when one last came or left.", lambda: self.nbytes)
        watch("sessions", "Conversations that keep their cache.", lambda: len(kept))
        watch("session_bytes", "Bytes of their caches.", lambda: kept.nbytes)

    @property
    def running(self) -> list[TokenSequence]:
        """Rows whose prompt is being read, or that decode."""
        return [*self._reading, *(row for group in list(self._groups) for row in group.rows)]

    def slots(self) -> dict[str, int]:
        """How many rows of the model's whole context could come now, by method."""
        return {method: self._free(plan) for method, plan in self._plans.items()}

    def _free(self, plan: Plan | None) -> int:
        return self.capacity.free(plan, self.running)

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and states of all rows that decode."""
        return sum(group.nbytes for group in list(self._groups))

    @property
    def status(self) -> str:
        """ "ok", or why a load balancer should send requests elsewhere."""
        if self.scheduler.closed:
            return "shutting down"
        if not self.thread.is_alive():
            return "not running"
        return "failing" if self._failed >= FAILING else "ok"

    def submit(self, job: Job) -> None:
        """Accepts a request, or raises :class:`ApiError`."""
        self.scheduler.put(job)

    def cancel(self, job: Job) -> None:
        """Nobody waits for this request any more: it leaves the queue, or its rows leave before their next token."""
        job.cancelled = True
        self.scheduler.discard(job)

    def abandon(self) -> None:
        """Fails every request that is not finished."""
        for job in {*self.scheduler.clear(), *(row.job for row in self.running)}:
            job.fail(shutting_down())

    def _work(self) -> None:
        try:
            while self._reading or self._groups or self.scheduler.wait():
                self._round()
        finally:
            self._methods.rest()  # whoever served the model gets it back as it was

    def _round(self) -> None:
        if all(row.over for row in self._reading):  # nobody waits for any of them
            self._reading, self._parts = [], iter(())
            self._admit()
        if self._reading:
            self._guarded(self._reading, lambda: next(self._parts, None))
        for group in list(self._groups):
            self._guarded(group.rows, partial(self._step, group))
        self._groups = [group for group in self._groups if not all(row.over for row in group.rows)]

    def _admit(self) -> None:
        """Begins to read the prompts of the next rows, if there is a place for them."""
        running = self.running
        busy = {row.job.session for row in running} - {None}
        job, free = self.scheduler.head(busy), self._most - len(running)
        if job is not None and free > 0:
            self._guarded(job.sequences, lambda: self._begin(job, running, free))

    def _begin(self, job: Job, running: list[TokenSequence], free: int) -> None:
        plan = self._plan(job.methods)
        joins, mix = self._methods.joins, lengths_mix(plan)

        def fits(rows: Sequence[TokenSequence]) -> bool:
            prompts = {row.prompt for row in rows}
            longest = max(map(len, prompts))
            together = joins and (mix or len(set(map(len, prompts))) == 1) and len(prompts) * longest <= self._chunk
            return (together or len(rows) == 1) and self.capacity.holds(plan, running, rows)

        if not self.capacity.holds(plan, [], job.sequences[:1]):
            raise ConfigError(self.capacity.refusal(plan, job))
        rows = self.scheduler.take(job, free, fits)
        if not rows:
            return
        for row in rows:
            row.begin(self._forward.rules(len(row.prompt)), self._ends)
            row.reserved = self.capacity.row_bytes(plan, row)
            if row.index == 0:
                self.metrics.waiting.observe(row.begun_at - row.job.accepted_at)
        self.metrics.prompt_tokens.inc(sum(len(row.prompt) for row in rows))
        self._reading, self._parts = rows, self._read(rows)

    def _read(self, rows: list[TokenSequence]) -> Iterator[None]:
        """Reads the prompts of some rows, a chunk at each step; in the end they join those of their kind."""
        for row in rows:
            yield from self._read_logprobs(row)
        group = yield from self._read_prompts([row for row in rows if not row.over])
        self._note(rows, group)
        self._reading = []
        if group is not None and group.rows:
            kind = group.kind()
            host = next((other for other in self._groups if other.kind() == kind), None)
            if host is None:
                self._groups.append(group)
            else:
                self._guarded([*host.rows, *group.rows], lambda: host.join(group))

    def _read_logprobs(self, row: TokenSequence) -> Iterator[None]:
        """Those of its prompt, by the dense model; a row that wants nothing else is over then."""
        if row.job.prompt_logprobs is not None:
            self._methods.use(())
            for part in prompt_logprobs(self._forward.model, row.prompt, row.job.prompt_logprobs):
                row.prompt_logprobs += part
                yield
                self._methods.use(())
        if row.job.max_new_tokens == 0:
            row.end_unsaid()

    def _read_prompts(self, rows: list[TokenSequence]) -> Generator[None, None, Group | None]:
        """A group of those rows that go on after their first token; None without any."""
        if not rows:
            return None
        job, methods = rows[0].job, rows[0].job.methods or self._methods.plain
        self._methods.use(methods)
        kept = None if job.session is None else self._conversations.take(job.session, rows[0].prompt, job.methods)
        job.reused_tokens = 0 if kept is None else len(kept.ids)
        cache = self._methods.new_cache() if kept is None else kept.cache
        prompts = list(dict.fromkeys(row.prompt for row in rows))  # several answers to one prompt read it once
        joins = self._methods.joins
        reading = Reading(self._forward, prompts, cache, job.features, joins)
        while (done := reading.step(self._chunk, self._chunk if self._groups else self._idle_chunk)) is None:
            yield
            self._methods.use(methods)
        group = Group(methods, done[0], joins and not job.features)
        group.begin(rows, [prompts.index(row.prompt) for row in rows], done[1])
        return group

    def _step(self, group: Group) -> None:
        group.leave()
        if group.rows:
            self._methods.use(group.methods)
            group.step()
            self.metrics.rows.observe(len(group.rows))
            self._note(group.rows, group)
            group.leave()

    def _note(self, rows: Sequence[TokenSequence], group: Group | None) -> None:
        """Counts the newest token of each row, and what is over."""
        if group is not None:
            self.metrics.generated_tokens.inc(len(rows))
        for row in rows:
            if row.finish is None:
                continue
            self._failed = 0
            mean, seconds = self.scheduler.row_seconds, time.monotonic() - row.begun_at
            self.scheduler.row_seconds = seconds if mean == 0 else 0.9 * mean + 0.1 * seconds
            if group is not None:
                self.metrics.note_row(row, group)
                if row.job.session is not None:
                    self._keep(row, group)

    def _keep(self, row: TokenSequence, group: Group) -> None:
        cache = group.running.taken_out(group.rows.index(row)) if row in group.rows else group.running.cache
        ids = (*row.prompt, *row.tokens)[: cache.get_seq_length()]  # the last token was never fed
        assert row.job.session is not None
        self.metrics.reused_tokens.inc(row.job.reused_tokens)
        self._conversations.keep(row.job.session, Conversation(ids, cache, row.job.methods, bytes_of(cache)))

    def _guarded(self, rows: Sequence[TokenSequence], work: Callable[[], None]) -> None:
        """Does the work of some rows; what goes wrong there ends them, and nobody else."""
        jobs = {row.job for row in rows}
        try:
            work()
        except _REFUSALS as error:
            self._fail(jobs, BadRequest(str(error)))
        except Exception as error:
            if any(job.methods in ((), self._own) for job in jobs):  # other methods say nothing about the server
                self._failed += 1
            self.metrics.failed_steps.inc()
            frames = "".join(traceback.format_tb(error.__traceback__)[-4:])
            # torch's own errors speak of memory and shapes; others may quote the prompt
            text = f": {error}" if isinstance(error, RuntimeError) else ""
            log.error("a step of %d rows failed: %s%s\n%s", len(rows), type(error).__name__, text, frames)
            self._fail(jobs, ApiError("error", "the model failed on this request; the server's log says why."))

    def _fail(self, jobs: set[Job], error: ApiError) -> None:
        for job in jobs:
            job.fail(error)
            self.scheduler.discard(job)
