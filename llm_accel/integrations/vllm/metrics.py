"""Freed blocks in vLLM's `/metrics`: a collector beside vLLM's own, which has nothing to show without a KV method.

A stat-logger plug-in of vLLM's would do as well, but where one is installed vLLM keeps statistics against the user's
will, with engines that never heard of us as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from prometheus_client import REGISTRY
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llm_accel.integrations.vllm.counters import Reader, files
from llm_accel.integrations.vllm.counts import LABELS, METRICS, Labels


class FreedBlocks(Collector):
    """What the engines count that a server's process has started."""

    def __init__(self) -> None:
        self._readers: list[Reader] = []

    def describe(self) -> list[Metric]:
        """Nothing: which engines there are is not known before a scrape."""
        return []

    def collect(self) -> Iterator[Metric]:
        """One family per metric; none where no engine counts."""
        for path in files():
            try:
                self._readers.append(Reader(path))
            except (OSError, ValueError, TypeError):
                continue  # it ended just now, or is not one of ours
        found = [(one.labels, one.read()) for one in self._readers]
        for name, (attribute, text) in METRICS.items() if found else ():
            family = GaugeMetricFamily(f"llm_accel:{name}", text, labels=LABELS)
            for labels, counts in found:
                family.add_metric(_values(labels), getattr(counts, attribute))
            yield family


def _values(labels: Labels) -> list[str]:
    return [getattr(labels, name) for name in LABELS]


@cache
def show_counts() -> None:
    """Has this process show what its engines count, should it be asked."""
    REGISTRY.register(FreedBlocks())
