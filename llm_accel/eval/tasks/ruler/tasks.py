"""The thirteen tasks as data: what stands in the haystack, how much is hidden, how long an answer may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llm_accel.eval.prompts.grammar import Kind

Family = Literal["niah", "vt", "cwe", "fwe", "qa"]
Hay = Literal["noise", "essay", "needles"]


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        new_tokens: tokens to generate at most.
        hay: what needles are hidden in: one passage again and again, prose, or other needles.
        keys, values, queries: keys that are hidden, values of each, keys that are asked for.
    """

    name: str
    family: Family
    new_tokens: int
    hay: Hay = "essay"
    key_kind: Kind = "word"
    value_kind: Kind = "number"
    keys: int = 1
    values: int = 1
    queries: int = 1


_NEEDLE_TOKENS = 128
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("niah_single_1", "niah", _NEEDLE_TOKENS, hay="noise"),
        Task("niah_single_2", "niah", _NEEDLE_TOKENS),
        Task("niah_single_3", "niah", _NEEDLE_TOKENS, value_kind="uuid"),
        Task("niah_multikey_1", "niah", _NEEDLE_TOKENS, keys=4),
        Task("niah_multikey_2", "niah", _NEEDLE_TOKENS, hay="needles"),
        Task("niah_multikey_3", "niah", _NEEDLE_TOKENS, hay="needles", key_kind="uuid", value_kind="uuid"),
        Task("niah_multivalue", "niah", _NEEDLE_TOKENS, values=4),
        Task("niah_multiquery", "niah", _NEEDLE_TOKENS, keys=4, queries=4),
        Task("vt", "vt", 30),
        Task("cwe", "cwe", 120),
        Task("fwe", "fwe", 50),
        Task("qa_1", "qa", 32),
        Task("qa_2", "qa", 32),
    )
}
QA = tuple(name for name, task in TASKS.items() if task.family == "qa")
WITHOUT_DATA = tuple(name for name in TASKS if name not in QA)
BUNDLED = ("niah_single_1", "niah_single_2", "niah_multikey_1")
"""Tasks of the kind that the bundled model was trained for: one value of one key, few needles."""
