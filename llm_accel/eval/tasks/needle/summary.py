"""Records to the summary: accuracy with intervals, memory and time per method and length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llm_accel.common.statistics import wilson
from llm_accel.eval.records import Record
from llm_accel.eval.summary import by_method, mean_of, progress_of
from llm_accel.eval.tasks.needle.settings import Settings


def summarize(settings: Settings, records: Sequence[Record], wanted: int, **about: Any) -> dict[str, Any]:
    """The summary as plain data.

    ``methods[spec]`` has the mean over lengths of ``exact`` (each length weighs the same), ``vs_dense`` (the same minus
    dense, over the lengths both have), and ``lengths[length]`` with the column: ``n``, ``exact`` with its 95 % Wilson
    interval ``ci95``, ``rouge1_recall``, ``recall``, ``kv_bytes`` and ``dense_kv_bytes`` per prompt after generation
    (mean), ``prefill_ms`` and ``decode_ms_per_token`` (medians; a step of a batch counts once).
    """
    return {
        **about,
        "task": settings.task,
        "query_agnostic": settings.query_agnostic,
        **progress_of(records, wanted),
        "methods": by_method(
            settings.methods, settings.lengths, records, _column, ("exact", "rouge1_recall", "recall")
        ),
    }


def _column(records: Sequence[Record]) -> dict[str, Any]:
    hits = sum(record["exact"] for record in records)
    return {
        "exact": mean_of([record["exact"] for record in records]),
        "ci95": [round(end, 4) for end in wilson(hits, len(records))],
        "rouge1_recall": mean_of([record["rouge1_recall"] for record in records]),
        "recall": mean_of([record["recall"] for record in records]),
    }
