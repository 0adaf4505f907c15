"""Scores, intervals, and the summary and table made of them."""

from __future__ import annotations

import json

import pytest

from llm_accel.common.statistics import wilson
from llm_accel.eval.tasks.needle.scoring import rouge1_recall, score
from llm_accel.eval.tasks.needle.settings import NeedleSettings
from llm_accel.eval.tasks.needle.task import NeedleTask
from tests.eval.needle_helpers import make_maker, tiny_model, tokenizer


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("it is 42.", "42", 1.0),
        ("it is 421.", "42", 0.0),
        ("A b", "a b c d", 0.5),
        ("a a a", "a a b", 2 / 3),
        ("a", "a a", 0.5),
        ("", "a", 0.0),
        ("anything", "", 0.0),
    ],
)
def test_rouge1_recall(answer, reference, expected):
    assert rouge1_recall(answer, reference) == pytest.approx(expected)


def test_scores_of_an_answer():
    assert score("1234567.", ["1234567"], "number") == {"exact": 1.0, "rouge1_recall": 1.0, "recall": 1.0}
    assert score("7654321, no, 1234567", ["1234567"], "number") == {"exact": 0.0, "rouge1_recall": 1.0, "recall": 1.0}
    assert score("12345678", ["1234567"], "number") == {"exact": 0.0, "rouge1_recall": 0.0, "recall": 1.0}
    assert score("2222222 and 1111111.", ["1111111", "2222222"], "number")["exact"] == 1.0
    assert score("1111111 and 3333333.", ["1111111", "2222222"], "number") == {
        "exact": 0.0, "rouge1_recall": 0.5, "recall": 0.5,
    }  # fmt: skip
    assert score(" river.", ["river"], "word")["exact"] == 1.0


def test_wilson_interval():
    assert wilson(11, 11) == (pytest.approx(0.7412, abs=1e-4), 1.0)
    assert wilson(0, 11) == (0.0, pytest.approx(0.2588, abs=1e-4))
    assert wilson(50, 100) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))
    assert wilson(0, 0) == (0.0, 1.0)


SETTINGS = NeedleSettings(methods=("dense", "random:budget=128"), lengths=(512, 1024), depths=(0.0, 100.0), samples=2)


def _task() -> NeedleTask:
    return NeedleTask(tiny_model(), tokenizer(), make_maker(**SETTINGS.to_dict()))


def _record(method: str, length: int, depth: float, sample: int, exact: float) -> dict[str, object]:
    return {
        "method": method, "length": length, "depth": depth, "sample": sample, "exact": exact, "rouge1_recall": exact,
        "recall": exact, "kv_bytes": length if method == "dense" else 128, "dense_kv_bytes": length, "prefill_ms": 5.0,
        "decode_ms_per_token": None if sample else 2.0,
    }  # fmt: skip


def _records() -> list[dict[str, object]]:
    dense = [_record("dense", n, d, s, 1.0) for n in (512, 1024) for d in (0.0, 100.0) for s in (0, 1)]
    return dense + [
        _record("random:budget=128", 512, d, s, float(d == 100 and s == 0)) for d in (0.0, 100.0) for s in (0, 1)
    ]


def test_summary_counts_and_compares_what_both_have():
    summary = _task().summarize(_records(), model="m")
    json.dumps(summary)
    assert (summary["records"], summary["missing"], summary["complete"]) == (12, 4, False)
    dense, other = (summary["methods"][name] for name in SETTINGS.methods)
    assert dense["exact"] == 1.0 and dense["vs_dense"] is None and dense["lengths"]["512"]["n"] == 4
    assert list(other["lengths"]) == ["512"]
    assert other["exact"] == 0.25 and other["vs_dense"] == -0.75
    assert other["lengths"]["512"]["ci95"] == [round(end, 4) for end in wilson(1, 4)]
    assert other["lengths"]["512"]["kv_bytes"] == 128 and other["lengths"]["512"]["decode_ms_per_token"] == 2.0


def test_cells_are_depths_by_lengths():
    assert _task().cell_means(_records(), "random:budget=128") == [[0.0, None], [0.5, None]]


def test_table_shows_every_method_and_what_is_missing():
    text = _task().render(_task().summarize(_records()))
    lines = text.splitlines()
    assert lines[0] == "needle: bundled needle model, multikey, 4 needles, word -> number, query-aware"
    assert lines[1].split("  ")[0] == "exact match" and "512" in lines[1] and "KV at 512" in lines[1]
    (row,) = [line for line in lines if line.startswith("random:budget=128")]
    assert row.split() == ["random:budget=128", "0.25", "-", "0.25", "-0.75", "0.25", "0.1", "KiB", "25.0%", "2.00"]
    assert lines[-1] == "samples per length: 4; 4 records missing"
    assert max(map(len, lines)) < 160
    empty = _task().render(_task().summarize([]))
    assert "16 records missing" in empty
