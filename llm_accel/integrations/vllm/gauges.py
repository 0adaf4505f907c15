"""What an engine counts where several API servers answer: Prometheus' own files in a folder that all of them read."""

from __future__ import annotations

from functools import cache

from prometheus_client import Gauge

from llm_accel.integrations.vllm.counts import LABELS, METRICS, Counts, Labels


@cache
def _gauge(name: str, text: str) -> Gauge:
    return Gauge(f"llm_accel:{name}", text, LABELS, multiprocess_mode="mostrecent")


def set_gauges(labels: Labels, counts: Counts) -> None:
    """For several API servers, all of which read what the scheduler's process writes into their common folder."""
    for name, (attribute, text) in METRICS.items():
        _gauge(name, text).labels(*(getattr(labels, one) for one in LABELS)).set(getattr(counts, attribute))
