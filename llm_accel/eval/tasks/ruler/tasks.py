"""The thirteen tasks as data: what stands in the haystack, how much is hidden, how long an answer may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llm_accel.eval.prompts.grammar import recall
from llm_accel.eval.prompts.needles import Needles

Family = Literal["niah", "vt", "cwe", "fwe", "qa"]


@dataclass(frozen=True)
class TaskSpec:
    """One task; ``new_tokens``: tokens to generate at most; ``needles``: what is hidden, for needle tasks."""

    name: str
    family: Family
    new_tokens: int
    needles: Needles | None = None

    def score(self, answer: str, expected: Sequence[str]) -> float:
        """RULER's scores, in [0, 1]: the share of the expected strings in the answer, case ignored
        (``string_match_all``); for questions about documents whether it has one of them (``string_match_part``)."""
        if self.family == "qa":
            return float(any(text.lower() in answer.lower() for text in expected))
        return round(recall(answer, expected), 4)


_NEEDLES = {
    "niah_single_1": Needles(hay="noise"),
    "niah_single_2": Needles(),
    "niah_single_3": Needles(value_kind="uuid"),
    "niah_multikey_1": Needles(keys=4),
    "niah_multikey_2": Needles(hay="needles"),
    "niah_multikey_3": Needles(hay="needles", key_kind="uuid", value_kind="uuid"),
    "niah_multivalue": Needles(values=4),
    "niah_multiquery": Needles(keys=4, queries=4),
}
TASKS: dict[str, TaskSpec] = {
    **{name: TaskSpec(name, "niah", 128, needles) for name, needles in _NEEDLES.items()},
    "vt": TaskSpec("vt", "vt", 30),
    "cwe": TaskSpec("cwe", "cwe", 120),
    "fwe": TaskSpec("fwe", "fwe", 50),
    "qa_1": TaskSpec("qa_1", "qa", 32),
    "qa_2": TaskSpec("qa_2", "qa", 32),
}
QA = tuple(name for name, task in TASKS.items() if task.family == "qa")
WITHOUT_DATA = tuple(name for name in TASKS if name not in QA)
BUNDLED = ("niah_single_1", "niah_single_2", "niah_multikey_1")
"""Tasks of the kind that the bundled model was trained for: one value of one key, few needles."""
