"""The hallucination benchmark: halves that differ, scenes that mislead, and a choice that recall binds."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.hallucination import ASKED, CHOOSING, CONDITIONS, DENSE, REPORTING, Misleading, best, rare
from llm_accel.eval.tasks.vision.scenes import SKEWED


def test_scenes_are_the_same_whatever_their_number_and_differ_between_halves():
    few, many = (Misleading(n, CHOOSING, CONDITIONS["faded"]) for n in (2, 5))
    other = Misleading(5, REPORTING, CONDITIONS["faded"])
    for sample in range(2):
        same, again, apart = (source.examples(sample) for source in (few, many, other))
        assert [one.question for one in same] == [one.question for one in again]
        assert (same[0].image == again[0].image).all() and not (same[0].image == apart[0].image).all()


def test_what_is_asked_and_seen():
    """POPE: as many questions with yes as with no, at most three of each and split; faded images have less contrast."""
    for sample in range(5):
        faded, whole = (Misleading(5, CHOOSING, CONDITIONS[name]).examples(sample) for name in ("faded", "sparse"))
        assert faded[0].task == "caption" and faded[0].objects == whole[0].objects
        for split in ("random", "popular", "adversarial"):
            answers = [one.answer for one in faded if one.split == split]
            assert 0 < answers.count("yes") == answers.count("no") <= ASKED
        assert np.std(faded[0].image) < np.std(whole[0].image)
    assert (np.argsort(rare().weights) == np.argsort(-SKEWED.weights, kind="stable")).mean() > 0.5


def test_methods_run_beside_what_a_condition_needs():
    assert CONDITIONS["faded"].spec(DENSE) == DENSE and CONDITIONS["faded"].spec("vhr") == "vhr"
    beside = CONDITIONS["sparse"].beside
    assert CONDITIONS["sparse"].spec(DENSE) == beside and CONDITIONS["sparse"].spec("vhr") == f"{beside}+vhr"


def test_recall_binds_the_choice():
    def entry(chair_s: float, recall: float) -> dict[str, Any]:
        return {"chair": {"chair_s": chair_s, "recall": recall}}

    found = {"silent": entry(0.0, 0.3), "good": entry(0.2, 0.795), "equal": entry(0.2, 0.82), "plain": entry(0.3, 0.8)}
    assert best(found, list(found), 0.8) == "equal"
    assert best(found, ["silent", "plain"], 0.8) == "plain"
    assert best(found, ["silent"], 0.8) == "silent"
