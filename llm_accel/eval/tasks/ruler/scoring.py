"""RULER's two scores, in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence

from llm_accel.eval.prompts.grammar import recall
from llm_accel.eval.tasks.ruler.tasks import Task


def score(task: Task, answer: str, expected: Sequence[str]) -> float:
    """Share of the expected strings that the answer holds (``string_match_all``), whatever their case; for questions
    about documents whether it holds one of them (``string_match_part``)."""
    if task.family == "qa":
        return float(any(text.lower() in answer.lower() for text in expected))
    return round(recall(answer, expected), 4)
