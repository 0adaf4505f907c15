"""RULER samples of ``llm-accel ruler --write-samples`` as tasks of lm-evaluation-harness.

The harness loads this file by its path, next to the task files; the score is RULER's own.
"""

from __future__ import annotations

from typing import Any

from llm_accel.errors import ConfigError
from llm_accel.eval.rows import read_rows
from llm_accel.eval.tasks.ruler.tasks import TASKS

_HOW = 'llm-accel ruler --write-samples FILE, then lm-eval --metadata \'{"samples": "FILE"}\''


def load(samples: str | None = None, budget: int = 0, **metadata: Any) -> dict[str, Any]:
    """The rows of a file whose tasks may generate ``budget`` tokens.

    Raises:
        ConfigError: no file was named, or it has no such row.
    """
    import datasets

    if samples is None:
        raise ConfigError(f"llm_accel_ruler: no samples; {_HOW}.")
    rows = [row for row in read_rows(samples, "samples") if row["max_new_tokens"] == budget]
    if not rows:
        raise ConfigError(f"llm_accel_ruler: {samples!r} has no sample with an answer of {budget} tokens; {_HOW}.")
    return {"test": datasets.Dataset.from_list(rows)}


def process(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """RULER's score of one answer."""
    return {"score": TASKS[doc["task"]].score(results[0], doc["outputs"])}
