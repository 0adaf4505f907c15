"""From runs to figures: medians with their spread, ratios to the dense model, and what the bounds say."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from llm_accel.eval.cost import ModelCost
from llm_accel.eval.tasks.bench.bounds import Bounds
from llm_accel.eval.tasks.bench.candidates import TimedCall
from llm_accel.eval.tasks.bench.memory import PeakMemory, largest_batch
from llm_accel.eval.tasks.bench.settings import BenchSettings, Candidate


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and count."""
    if len(values) < 2:
        return {"median": values[0], "q1": values[0], "q3": values[0], "n": len(values)}
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "q1": low, "q3": high, "n": len(values)}


def summarize_cell(
    settings: BenchSettings,
    candidate: Candidate,
    cell: tuple[int, int],
    runs: Sequence[TimedCall],
    dense: Sequence[TimedCall],
    peak: PeakMemory | None,
    work: ModelCost,
    bounds: Bounds,
) -> dict[str, Any]:
    """One record of the result.

    Ratios are medians over the rounds of dense over candidate within one round, so that a slow round counts for both.
    ``speedup_bound`` is what the bytes of a step allow: weights and dense cache over weights and held cache.
    """
    length, batch = cell
    first, steps = quartiles([run.first_ms for run in runs]), quartiles([ms for run in runs for ms in run.steps_ms])
    held, dense_held = runs[-1].kv_bytes, dense[-1].kv_bytes
    moved = work.step_bytes + held
    step_bound = 1e3 * moved / bounds.bandwidth
    prompt_bound = 1e3 * work.prompt_flop(length, batch) / bounds.flop
    record: dict[str, Any] = {
        "name": candidate.name,
        "method": candidate.method,
        "decode": candidate.decode,
        "length": length,
        "batch": batch,
        "first_token_ms": first,
        "decode_ms": steps,
        "tokens_per_s": 1e3 * batch / steps["median"],
        "kv_bytes": held,
        "dense_kv_bytes": dense_held,
        "step_bytes": moved,
        "decode_bound_ms": step_bound,
        "decode_bound_percent": 100 * step_bound / steps["median"],
        "prefill_flop_percent": 100 * prompt_bound / first["median"],
        "decode_speedup": paired_ratio(dense, runs, lambda run: statistics.median(run.steps_ms)),
        "first_token_speedup": paired_ratio(dense, runs, lambda run: run.first_ms),
        "kv_saving": dense_held / held,
        "speedup_bound": (work.step_bytes + dense_held) / moved,
        "peak_prefill_bytes": None if peak is None else peak.prefill,
        "peak_decode_bytes": None if peak is None else peak.decode,
        "backends": {name: list(said) for name, said in runs[-1].notes.items()},
    }
    record["speedup_share"] = record["decode_speedup"] / record["speedup_bound"]
    if settings.memory_limit is not None:
        peak_bytes = record["peak_prefill_bytes"]
        record["largest_batch"] = largest_batch(settings.memory_limit, work.weight_bytes, peak_bytes, held, batch)
    return record


def paired_ratio(dense: Sequence[TimedCall], runs: Sequence[TimedCall], figure: Callable[[TimedCall], float]) -> float:
    """Median over the rounds of dense over candidate."""
    return statistics.median(figure(one) / figure(other) for one, other in zip(dense, runs, strict=True))
