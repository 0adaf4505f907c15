"""Scores of one answer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from llm_accel.eval.prompts.grammar import Kind, exact_match, recall

_WORD = re.compile(r"[^\W_]+")


def rouge1_recall(answer: str, reference: str) -> float:
    """Share of the reference's words (letters and digits, lower case, with multiplicity) that occur in the answer.

    ROUGE-1 recall without stemming (Lin 2004), in [0, 1].
    """
    wanted, found = (Counter(_WORD.findall(text.lower())) for text in (reference, answer))
    return (wanted & found).total() / max(wanted.total(), 1)


def score(answer: str, values: Sequence[str], kind: Kind) -> dict[str, float]:
    """The three scores of a record.

    ``exact``: the first values in the answer are the expected ones, in any order, 0 or 1. ``rouge1_recall``: see
    above, against the values alone. ``recall``: RULER's share of the values that occur anywhere in the answer.
    """
    return {
        "exact": float(exact_match(answer, values, kind)),
        "rouge1_recall": round(rouge1_recall(answer, " ".join(values)), 4),
        "recall": round(recall(answer, values), 4),
    }
