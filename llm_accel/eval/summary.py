"""Summaries by method and length: a column of records for each length, means over columns, the difference to dense."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean, median
from typing import Any

from llm_accel.eval.records import Record

DENSE = "dense"


def by_method(
    methods: Sequence[str],
    lengths: Sequence[int],
    records: Sequence[Record],
    column: Callable[[Sequence[Record]], dict[str, Any]],
    measures: Sequence[str],
) -> dict[str, Any]:
    """For each method ``n``, the mean over lengths of each measure (each length weighs the same), ``vs_dense`` (the
    first measure minus that of dense, over the lengths both have) and ``lengths[length]``.

    Args:
        column: what is told of the records of one method and length.
        measures: entries of a column.
    """
    tables: dict[str, Any] = {}
    for method in methods:
        own = [record for record in records if record["method"] == method]
        parts = {str(length): [record for record in own if record["length"] == length] for length in lengths}
        columns = {length: {"n": len(part), **column(part), **cost_of(part)} for length, part in parts.items() if part}
        means = {name: mean_of([entry[name] for entry in columns.values()]) for name in measures}
        tables[method] = {"n": len(own), **means, "vs_dense": None, "lengths": columns}
    dense = tables.get(DENSE, {"lengths": {}})["lengths"]
    for method, table in tables.items():
        found = table["lengths"]
        shared = [length for length in found if length in dense]
        if method != DENSE and shared:
            table["vs_dense"] = mean_of([found[i][measures[0]] - dense[i][measures[0]] for i in shared])
    return tables


def cost_of(records: Sequence[Record]) -> dict[str, Any]:
    """Bytes per prompt after generation (mean), and times (medians; a step of a batch counts once)."""
    times = {
        name: [record[name] for record in records if record[name] is not None]
        for name in ("prefill_ms", "decode_ms_per_token")
    }
    return {
        "kv_bytes": round(fmean(record["kv_bytes"] for record in records)),
        "dense_kv_bytes": round(fmean(record["dense_kv_bytes"] for record in records)),
        **{name: round(median(some), 3) if some else None for name, some in times.items()},
    }


def progress_of(records: Sequence[Record], wanted: int) -> dict[str, Any]:
    """How much of a run is done."""
    return {"records": len(records), "complete": len(records) == wanted, "missing": wanted - len(records)}


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are not None, to four decimals."""
    found = [value for value in values if value is not None]
    return round(fmean(found), 4) if found else None
