"""Scores on examples worked out by hand: POPE, CHAIR, COCO's words, intervals."""

from __future__ import annotations

import pytest

from llm_accel.common.statistics import bootstrap, share_of_sums, wilson
from llm_accel.eval.tasks.vision.coco import categories, objects_in
from llm_accel.eval.tasks.vision.scoring import exact, pairs, pope_scores, score, yes_no
from llm_accel.eval.tasks.vision.settings import VisionSettings
from llm_accel.eval.tasks.vision.summary import summarize
from llm_accel.eval.tasks.vision.table import render, void_tasks


def test_wilson_interval_against_known_values():
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29
    known = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0, 0.1611), (1, 29): (0.0061, 0.1718)}
    for (hits, n), ends in known.items():
        assert wilson(hits, n) == pytest.approx(ends, abs=5e-5)


def test_bootstrap_is_seeded_and_agrees_with_the_binomial():
    hits = [[1.0, 1.0]] * 60 + [[0.0, 1.0]] * 40
    first = bootstrap(hits, share_of_sums, seed=3)
    assert first is not None and first == bootstrap(hits, share_of_sums, seed=3)
    assert first == pytest.approx((0.6 - 1.96 * 0.049, 0.6 + 1.96 * 0.049), abs=0.015)
    assert bootstrap([[0.0, 0.0]] * 5, share_of_sums) is None  # a share of nothing
    assert bootstrap([], share_of_sums) is None
    two_per_image = [[row[0] * 2, 2.0] for row in hits]  # questions of one image stay together: no narrower
    assert bootstrap(two_per_image, share_of_sums, seed=3) == first


def test_exact_match_and_yes_no():
    assert exact(" A red  Circle, a blue square. ", "a red circle, a blue square.") == 1
    assert exact("red circle", "a red circle.") == 0
    said = {"Yes.": "yes", "no, there is not": "no", "There is not a cat": "no", "Nothing yesterday": None, "": None}
    assert {text: yes_no(text) for text in said} == said


def test_pope_by_hand():
    right = ["yes", "yes", "yes", "yes", "no", "no", "no", "no"]
    said = ["yes", "yes", "no", None, "yes", "no", "no", None]
    scores = pope_scores(list(zip(said, right, strict=True)))
    assert scores["n"] == 8 and scores["correct"] == 4 and scores["neither"] == 2
    assert scores["precision"] == pytest.approx(2 / 3)  # two of three yes
    assert scores["recall"] == pytest.approx(2 / 4)  # two of four that are there
    assert scores["f1"] == pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))
    assert scores["yes_ratio"] == pytest.approx(3 / 8)
    never = pope_scores([("no", "yes"), ("no", "no")])
    assert never["precision"] is None and never["recall"] == 0 and never["f1"] == 0
    assert pope_scores([])["f1"] is None


def test_chair_of_one_caption():
    objects = frozenset({"red circle", "blue square", "green star"})
    text = "a red circle, a red circle, a blue circle, two blue squares."
    scores = score("caption", text, ["a red circle, a blue square, a green star."], objects, pairs)
    assert scores["named"] == ["red circle", "red circle", "blue circle", "blue square"]
    assert scores["invented"] == ["blue circle"] and (scores["found"], scores["there"]) == (2, 3)
    assert scores["exact"] == 0 and scores["words"] == 12


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("A man and two women riding horses near a fire hydrant.", ["person", "person", "horse", "fire hydrant"]),
        ("hot dogs beside a dog, and a teddy bear", ["hot dog", "dog", "teddy bear"]),
        ("a baby elephant beside an orange truck and an orange", ["elephant", "truck", "orange"]),
        ("People at a train station; skis on the ski slope, two traffic lights", ["person", "skis", "traffic light"]),
        ("puppies, mice, knives, wine glasses and a bookshelf", ["dog", "mouse", "knife", "wine glass"]),
        ("a sofa, benches, a TV and cell phones on the table", ["couch", "bench", "tv", "cell phone", "dining table"]),
        ("a tabletop of catkins and carpet", []),
    ],
)
def test_words_for_coco_categories(text, named):
    assert objects_in(text) == named


def test_every_category_is_found_by_its_own_name_and_plural():
    assert len(categories()) == len(set(categories())) == 80
    for name in categories():
        assert objects_in(f"there is a {name}.") == [name]
        assert objects_in(f"a {name}, two {name}s.")[:1] == [name]


def _records(method, hits, captions=()):
    common = {"method": method, "number": 0, "split": "random", "expected": "yes", "visual_before": 100,
              "visual_after": 25.0, "visual_per_layer": 25.0, "flops": 50, "patch_recall": 0.5}  # fmt: skip
    for sample, hit in enumerate(hits):
        said = "yes" if hit else "no"
        yield common | {"sample": sample, "task": "existence", "exact": float(hit), "said": said, "prefill_ms": sample}
    for sample, (named, invented, found, there) in enumerate(captions):
        yield common | {
            "sample": sample, "task": "caption", "exact": 0.0, "named": ["x"] * named, "invented": ["x"] * invented,
            "found": found, "there": there, "words": 5 * named, "prefill_ms": 1.0,
        }  # fmt: skip


def test_summary_by_hand():
    settings = VisionSettings(methods=("dense", "flowcut", "blind"))
    records = [
        *_records("dense", [1, 1, 1, 0]),
        *_records("flowcut", [1, 0, 1, 0], [(4, 1, 2, 4), (2, 0, 2, 2), (0, 0, 0, 2)]),
        *_records("blind", [1, 1, 0, 1]),
    ]
    summary = summarize(settings, records, wanted=20, model="m")
    assert (summary["records"], summary["missing"], summary["complete"]) == (15, 5, False)
    flow = summary["methods"]["flowcut"]
    task = flow["tasks"]["existence"]
    assert task["exact"] == 0.5 and task["vs_dense"] == -0.25 and task["ci95"] == [0.15, 0.85]
    assert task["vs_dense_ci95"][0] < -0.25 < task["vs_dense_ci95"][1] <= 0
    assert flow["exact"] == 0.25 and 0 <= flow["exact_ci95"][0] < 0.25 < flow["exact_ci95"][1] <= 0.5  # no caption is
    assert flow["pope"]["random"]["accuracy"] == 0.5 and flow["pope"]["random"]["f1"] == pytest.approx(2 / 3, abs=1e-4)
    chair = flow["chair"]
    assert chair["chair_i"] == pytest.approx(1 / 6, abs=1e-4) and chair["chair_s"] == pytest.approx(1 / 3, abs=1e-4)
    assert chair["recall"] == 0.5 and chair["words"] == 10 and chair["mentions"] == 2
    assert chair["repeated"] == pytest.approx(4 / 6, abs=1e-4)  # the first caption says one thing four times
    assert flow["flops_vs_dense"] == 1 and flow["patch_recall"] == 0.5 and flow["prefill_ms"] == 1
    assert summary["methods"]["dense"]["tasks"]["existence"]["vs_dense"] is None
    assert void_tasks(summary["methods"]) == ["existence"]  # dense 0.75, blind 0.75
    text = render(settings, summary, "m")
    for part in ("100 > 25", "0.50 [0.15-0.85]", "void: existence", "5 records missing", "0.17 ["):
        assert part in text, text
