"""What a load took on each server, as plain data and as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llm_accel.eval.table import aligned, number
from llm_accel.eval.tasks.bench_serve.client import OK, Timing

_SHOWN = (50, 95, 99)
_MESSAGE = 300  # characters of what a server says of a failed request

Round = tuple[Sequence[Timing], float]


def summarize(rounds: Sequence[Round]) -> dict[str, Any]:
    """Figures of one server over its rounds: rates from all of them together, times from all requests that ended well.
    Times in seconds, at the 50th, 95th and 99th percentile."""
    timings = [timing for timings, _ in rounds for timing in timings]
    done = [timing for timing in timings if timing.outcome == OK]
    wall = sum(seconds for _, seconds in rounds)
    return {
        "outcomes": dict(Counter(timing.outcome for timing in timings)),
        "errors": {timing.outcome: timing.text[:_MESSAGE] for timing in timings if timing.outcome != OK},
        "wall_s": wall,
        "requests_per_s": len(done) / wall,
        "prompt_tokens_per_s": sum(timing.prompt_tokens for timing in done) / wall,
        "new_tokens_per_s": sum(timing.new_tokens for timing in done) / wall,
        "first_token_s": _percentiles([timing.first for timing in done]),
        "between_tokens_s": _percentiles([timing.between for timing in done]),
        "longest_gap_s": _percentiles([timing.longest_gap for timing in done]),
        "request_s": _percentiles([timing.seconds for timing in done]),
    }


def _percentiles(values: Sequence[float | None]) -> dict[str, float]:
    known = [value for value in values if value is not None]
    return {f"p{q}": float(np.percentile(known, q)) for q in _SHOWN} if known else {}


def render(servers: Mapping[str, dict[str, Any]]) -> str:
    """A row for each server, and a line for each kind of failure."""
    shown = {"first_token_s": "first token", "between_tokens_s": "per token", "request_s": "request"}
    header = ["server", "ok", "seconds", "tokens/s"]
    for times in shown.values():
        header += [f"{times} p50", "p95"]
    rows, notes = [header], []
    for name, figures in servers.items():
        outcomes = figures["outcomes"]
        row = [name, f"{outcomes.get(OK, 0)}/{sum(outcomes.values())}", number(figures["wall_s"], ".1f")]
        row.append(number(figures["new_tokens_per_s"], ".1f"))
        for times in shown:
            row += [number(figures[times].get(q), ".3f") for q in ("p50", "p95")]
        rows.append(row)
        for outcome, count in outcomes.items():
            if outcome != OK:
                notes.append(f"{name}: {count} x {outcome} {figures['errors'][outcome]}".rstrip())
    return "\n".join([*aligned(rows), *notes])
