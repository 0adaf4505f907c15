"""What rows need of the memory for keys and values, and how many of them it holds."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from llm_accel.errors import ConfigError
from llm_accel.patches.footprint import Load, Storage, row_bytes
from llm_accel.patches.plan import Plan
from llm_accel.serve.sequences import Job, TokenSequence
from llm_accel.serve.settings import ServeSettings, context_of

MIB = 2**20


class Capacity:
    """The limit on keys and values, if there is one; figures are the most that rows can come to hold.

    Raises:
        ConfigError: there is a limit, and the layers of this model cannot be counted.
    """

    def __init__(self, model: Any, settings: ServeSettings) -> None:
        self._storage, self._settings = Storage.of(model.get_decoder()), settings
        self._limit, self._context = (settings.kv_memory_mib or math.inf) * MIB, context_of(model, settings)
        problem = self._storage.wiring.problem
        if problem is not None and self._limit < math.inf:
            raise ConfigError(f"--kv-memory-mib: what this model stores cannot be counted: {problem}.")

    def row_bytes(self, plan: Plan | None, row: TokenSequence) -> int:
        """Of one row at the end of the longest answer that it may give; 0 without a limit."""
        return self._bytes(plan, Load(len(row.prompt), row.job.max_new_tokens))

    def holds(self, plan: Plan | None, running: Sequence[TokenSequence], rows: Sequence[TokenSequence]) -> bool:
        """Whether these rows may come beside those that run."""
        after = _padded(running, [(row.job.methods, self.row_bytes(plan, row)) for row in rows])
        prompts = {row.prompt for row in rows}  # kept whole until their last chunk
        reading = len(prompts) * self._bytes(None, Load(max(map(len, prompts)), 1))
        return max(_padded(running) + reading, after) <= self._limit

    def refusal(self, plan: Plan | None, job: Job) -> str:
        """Why a request can never be served."""
        need = self.row_bytes(plan, job.sequences[0]) / MIB
        return (
            f"a prompt of {len(job.prompts[0])} tokens and {job.max_new_tokens} new ones need up to {need:.1f} MiB of "
            f"keys and values with {job.method_name}; this server has {self._settings.kv_memory_mib:g} MiB."
        )

    def free(self, plan: Plan | None, running: Sequence[TokenSequence]) -> int:
        """Rows as long as the model's context, prompt and answer, that could come now."""
        rows, context = self._settings.max_batch - len(running), self._context
        if self._limit == math.inf or context is None:
            return rows
        answer = min(self._settings.max_new_tokens or context // 2, context - 1)
        each = self._bytes(plan, Load(context - answer, answer))
        return max(0, min(rows, int((self._limit - _padded(running)) // each)))

    def _bytes(self, plan: Plan | None, load: Load) -> int:
        if self._limit == math.inf:
            return 0
        if plan is None:
            return load.stored * sum(self._storage.entry_bytes.values()) + self._storage.state_bytes
        return row_bytes(self._storage, plan, load)


def _padded(rows: Sequence[TokenSequence], more: Sequence[tuple[object, int]] = ()) -> int:
    """Bytes of these rows and of ``more``, by methods and size: the same methods share caches, in which each row is as
    long as the longest beside it."""
    held = defaultdict[object, list[int]](list)
    for methods, size in [*((row.job.methods, row.reserved) for row in rows), *more]:
        held[methods].append(size)
    return sum(len(each) * max(each) for each in held.values())
