"""What is compared: each method at a share of the entries kept, here and in kvpress, both with their own defaults.

Read in both environments, so that it imports neither package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

QUERY_AWARE = ("snapkv", "adakv", "pyramidkv", "streaming_llm")
CONTEXT = ("kvzip", "snapkv")  # with the question after compression
SHARES = {False: (0.25, 0.125), True: (0.25, 0.125, 0.0625)}


@dataclass(frozen=True)
class Row:
    """One method at one share.

    Attributes:
        method: our name of it; ``dense`` with a share of 1.
        share: entries kept, of those of the prompt.
        agnostic: whether the question follows after compression.
    """

    method: str
    share: float
    agnostic: bool

    @property
    def name(self) -> str:
        """For records and tables."""
        return self.method if self.method == "dense" else f"{self.method}:ratio={self.share:g}"


def rows(agnostic: bool) -> list[Row]:
    """Dense first; the largest share of a method before its smaller ones."""
    methods = CONTEXT if agnostic else QUERY_AWARE
    shares = SHARES[agnostic]
    return [Row("dense", 1.0, agnostic), *(Row(method, share, agnostic) for method in methods for share in shares)]


def press(row: Row) -> Any:
    """kvpress' object for a row; None for dense. Works where kvpress is installed."""
    if row.method == "dense":
        return None
    import kvpress

    removed = 1 - row.share
    made = {
        "snapkv": lambda: kvpress.SnapKVPress(compression_ratio=removed),
        "adakv": lambda: kvpress.AdaKVPress(kvpress.SnapKVPress(compression_ratio=removed)),
        "pyramidkv": lambda: kvpress.PyramidKVPress(compression_ratio=removed),
        "streaming_llm": lambda: kvpress.StreamingLLMPress(compression_ratio=removed),
        "kvzip": lambda: kvpress.KVzipPress(compression_ratio=removed),
    }
    return made[row.method]()
