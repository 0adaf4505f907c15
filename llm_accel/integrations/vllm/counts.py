"""What is counted of an engine with a KV method, and under which names it is shown."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Labels:
    """Whose counts they are.

    Attributes:
        model_name: as it is served.
        engine: the data-parallel index.
        method: the KV method in its text form.
    """

    model_name: str
    engine: str
    method: str


@dataclass(frozen=True)
class Counts:
    """Since the start of an engine.

    Attributes:
        blocks: blocks that were freed before their request had ended.
        size: their bytes, in all layers of all workers.
        running: requests that hold blocks now.
    """

    blocks: int = 0
    size: int = 0
    running: int = 0


METRICS = {
    "kv_blocks_freed": (
        "blocks",
        "KV blocks freed before their request had ended, since the engine's start.",
    ),
    "kv_bytes_freed": ("size", "Their bytes, in all layers of all workers."),
    "requests_running": ("running", "Requests that hold KV blocks now."),
}
"""Name -> attribute of :class:`Counts`, and what it is. Gauges, because each of several API servers shows the same."""
LABELS = ("model_name", "engine", "method")
