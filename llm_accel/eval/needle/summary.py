"""Records to the summary: accuracy with intervals, memory and time per method and length."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from llm_accel.eval.needle.records import Record
from llm_accel.eval.needle.scoring import wilson
from llm_accel.eval.needle.settings import Settings

DENSE = "dense"


def summarize(settings: Settings, records: Sequence[Record], **about: Any) -> dict[str, Any]:
    """The summary as plain data.

    ``methods[spec]`` has the mean over lengths of ``exact`` (each length weighs the same), ``vs_dense`` (the same minus
    dense, over the lengths both have), and ``lengths[length]`` with the column: ``n``, ``exact`` with its 95 % Wilson
    interval ``ci95``, ``rouge1_recall``, ``recall``, ``kv_bytes`` and ``dense_kv_bytes`` per prompt after generation
    (mean), ``prefill_ms`` and ``decode_ms_per_token`` (medians; a step of a batch counts once).
    """
    methods: dict[str, Any] = {}
    for method in settings.methods:
        own = [record for record in records if record["method"] == method]
        columns = {str(length): _column([r for r in own if r["length"] == length]) for length in settings.lengths}
        columns = {length: column for length, column in columns.items() if column["n"]}
        methods[method] = {
            "n": len(own),
            "exact": _mean([column["exact"] for column in columns.values()]),
            "rouge1_recall": _mean([column["rouge1_recall"] for column in columns.values()]),
            "recall": _mean([column["recall"] for column in columns.values()]),
            "vs_dense": None,
            "lengths": columns,
        }
    dense = methods.get(DENSE, {"lengths": {}})["lengths"]
    for method, entry in methods.items():
        shared = [length for length in entry["lengths"] if length in dense]
        if method != DENSE and shared:
            entry["vs_dense"] = _mean([entry["lengths"][i]["exact"] - dense[i]["exact"] for i in shared])
    wanted = len(settings.methods) * len(settings.lengths) * len(settings.depths) * settings.samples
    return {
        **about,
        "task": settings.task,
        "query_agnostic": settings.query_agnostic,
        "records": len(records),
        "complete": len(records) == wanted,
        "missing": wanted - len(records),
        "methods": methods,
    }


def cell_means(settings: Settings, records: Sequence[Record], method: str) -> list[list[float | None]]:
    """Mean exact match per cell, rows are depths and columns lengths as in the settings; None where nothing ran."""
    sums: dict[tuple[float, int], list[float]] = {}
    for record in records:
        if record["method"] == method:
            sums.setdefault((float(record["depth"]), record["length"]), []).append(record["exact"])
    return [[_mean(sums.get((depth, length), [])) for length in settings.lengths] for depth in settings.depths]


def _column(records: Sequence[Record]) -> dict[str, Any]:
    hits = sum(record["exact"] for record in records)
    steps = [record["decode_ms_per_token"] for record in records if record["decode_ms_per_token"] is not None]
    return {
        "n": len(records),
        "exact": _mean([record["exact"] for record in records]),
        "ci95": [round(end, 4) for end in wilson(hits, len(records))],
        "rouge1_recall": _mean([record["rouge1_recall"] for record in records]),
        "recall": _mean([record["recall"] for record in records]),
        "kv_bytes": round(fmean(record["kv_bytes"] for record in records)) if records else None,
        "dense_kv_bytes": round(fmean(record["dense_kv_bytes"] for record in records)) if records else None,
        "prefill_ms": round(median(record["prefill_ms"] for record in records), 3) if records else None,
        "decode_ms_per_token": round(median(steps), 3) if steps else None,
    }


def _mean(values: Sequence[float]) -> float | None:
    return round(fmean(values), 4) if values else None
