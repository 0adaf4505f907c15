"""Scenes and questions of the vision evaluation, checked against a second reading of the image."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest

from llm_accel.eval.tasks.vision import scenes as sc
from llm_accel.eval.tasks.vision.questions import NUMBERS, POPE_SPLITS, TASKS, questions
from training.vision_data import draw_scenes

PAINT = {"red": (230, 31, 31), "green": (26, 179, 38), "blue": (38, 64, 242), "yellow": (242, 230, 26)}
PAINT |= {"purple": (153, 26, 191), "orange": (255, 133, 13), "cyan": (26, 217, 230), "white": (247, 247, 247)}


@dataclass
class Seen:
    shape: str
    colour: str
    y: float
    x: float


def see(scene: sc.Scene, index: int) -> Seen:
    """A thing as its pixels show it: the nearest paint, and the symmetry of its outline."""
    area = scene.owner == index + 1
    y, x = np.nonzero(area)
    dy, dx = y - y.mean(), x - x.mean()
    r2, angle = dy**2 + dx**2, np.arctan2(dy, dx)
    fold = {n: abs((r2 * np.exp(1j * n * angle)).sum()) / r2.sum() for n in (3, 4, 5)}
    n, strength = max(fold.items(), key=lambda item: item[1])
    spread = r2.mean() / area.sum()  # second moment over area: larger for a cross than for a square
    four = "cross" if spread > 0.182 else "square"
    shape = "circle" if strength < 0.12 else {3: "triangle", 4: four, 5: "star"}[n]
    rgb = np.median(scene.image[area], 0)
    colour = min(PAINT, key=lambda name: np.abs(rgb / rgb.max() - np.array(PAINT[name]) / max(PAINT[name])).sum())
    return Seen(shape, colour, y.mean(), x.mean())


@pytest.fixture(scope="module")
def scenes() -> list[sc.Scene]:
    return draw_scenes(60, 1) + draw_scenes(20, 2, "dense")


def test_the_same_seed_draws_the_same_scenes() -> None:
    first, again, other = (draw_scenes(3, seed, "dense") for seed in (5, 5, 6))
    assert all((a.image == b.image).all() and a.things == b.things for a, b in zip(first, again, strict=True))
    assert not (first[0].image == other[0].image).all()
    asked = [questions(first[0], np.random.default_rng(1), task, 3) for task in TASKS]
    assert asked == [questions(again[0], np.random.default_rng(1), task, 3) for task in TASKS]


def test_things_are_what_and_where_the_image_shows_them(scenes: list[sc.Scene]) -> None:
    for scene in scenes:
        for i, thing in enumerate(scene.things):
            seen = see(scene, i)
            assert (seen.shape, seen.colour) == (thing.shape, thing.colour)
            top, left, bottom, right = thing.box
            area = scene.owner == i + 1
            assert area[top:bottom, left:right].sum() == area.sum() > 0
            assert all(edge.any() for edge in (area[top], area[bottom - 1], area[:, left], area[:, right - 1]))
        assert len({thing.pair for thing in scene.things}) == len(scene.things) == scene.owner.max()
        assert [(t.row, t.column) for t in scene.things] == sorted((t.row, t.column) for t in scene.things)
        covered = [
            (scene.owner[y : y + 8, x : x + 8] > 0).sum() > 7.68 for y in range(0, 80, 8) for x in range(0, 80, 8)
        ]
        assert scene.patches.ravel().tolist() == covered


def test_splits_have_their_number_of_things(scenes: list[sc.Scene]) -> None:
    assert Counter(len(scene.things) for scene in scenes).keys() == {1, 2, 3, 4, 8, 9, 10, 11, 12}
    with pytest.raises(ValueError, match="1 to 16 things, got 17"):
        sc.draw_scene(np.random.default_rng(0), 17)


def test_the_prior_is_skewed_and_ties_partners() -> None:
    def drawn(prior: sc.Prior) -> tuple[np.ndarray, float]:
        rng = np.random.default_rng(0)
        present = np.zeros((500, sc.PAIRS))
        for row in present:
            pairs: list[int] = []
            for _ in range(3):
                pairs.append(int(rng.choice(sc.PAIRS, p=prior.following(pairs))))
            row[pairs] = 1
        together = present.T @ present
        return present.sum(0), float((together[np.arange(40), (np.arange(40) + 11) % 40]).sum() / 500)

    often, tied = drawn(sc.SKEWED)
    even, loose = drawn(sc.Prior(np.full(sc.PAIRS, 1 / sc.PAIRS), np.ones((sc.PAIRS, sc.PAIRS))))
    assert often.max() > 5 * often.min() and even.max() < 3 * even.min()
    assert tied > 4 * loose
    assert drawn_pairs_follow(draw_scenes(60, 3, "dense"), often)


def drawn_pairs_follow(scenes: list[sc.Scene], often: np.ndarray) -> bool:
    """Whether scenes show pairs as often as the prior alone draws them: the rarer half is rarer."""
    count = Counter(thing.pair for scene in scenes for thing in scene.things)
    rare = np.argsort(often)[: sc.PAIRS // 2].tolist()
    return sum(count[pair] for pair in rare) < 0.45 * count.total()


def test_answers_are_right_by_a_second_reading(scenes: list[sc.Scene]) -> None:
    rng = np.random.default_rng(0)
    asked: Counter[str] = Counter()
    for scene in scenes:
        seen = [see(scene, i) for i in range(len(scene.things))]
        pairs = [f"{s.colour} {s.shape}" for s in seen]
        for task in TASKS:
            for question in questions(scene, rng, task, 50):
                words = question.prompt
                assert words.count("<image>") == 1
                named = [
                    pairs.index(pair) for pair in re.findall(r"the (\w+ (?:circle|square|triangle|cross|star))", words)
                ]
                match task:
                    case "existence":
                        right = "yes" if words.split(" a ")[1].rstrip("?") in pairs else "no"
                    case "colour":
                        (right,) = [s.colour for s in seen if words.endswith(f"the {s.shape}?")]
                    case "shape":
                        (right,) = [s.shape for s in seen if f"the {s.colour} thing" in words]
                    case "count":
                        right = NUMBERS[int(scene.owner.max()) - 1]
                    case "spatial":
                        a, b = (seen[i] for i in named)
                        right = (
                            ("left" if a.x < b.x else "right") if "left" in words else "above" if a.y < b.y else "below"
                        )
                    case "caption":
                        right = ", ".join(f"a {pair}" for pair in pairs) + "."
                assert question.answer == right, (words, pairs)
                asked[task] += 1
    assert all(asked[task] >= 60 for task in TASKS)


def test_existence_splits_are_balanced_and_choose_their_negatives(scenes: list[sc.Scene]) -> None:
    rng = np.random.default_rng(0)
    weight: dict[str, list[float]] = {split: [] for split in POPE_SPLITS}
    tie: dict[str, list[float]] = {split: [] for split in POPE_SPLITS}
    for scene in scenes:
        asked = questions(scene, rng, "existence", 2)
        assert Counter((q.split, q.answer) for q in asked).keys() == {
            (s, a) for s in POPE_SPLITS for a in ("yes", "no")
        }
        assert len(set(Counter((q.split, q.answer) for q in asked).values())) == 1
        assert len(asked) == 6 * min(2, len(scene.things))
        for q in asked:
            if q.answer == "no":
                colour, shape = q.prompt.rstrip("?").split()[-2:]
                pair = sc.SHAPES.index(shape) * 8 + sc.COLOURS.index(colour)
                weight[q.split].append(float(sc.SKEWED.weights[pair]))
                tie[q.split].append(float(sc.SKEWED.following([t.pair for t in scene.things])[pair]))
    assert np.mean(weight["popular"]) > 2 * np.mean(weight["random"])
    assert np.mean(tie["adversarial"]) > 3 * np.mean(tie["random"])
    assert np.mean(tie["adversarial"]) > 1.15 * np.mean(tie["popular"])


def test_ambiguous_questions_are_not_asked() -> None:
    alone = draw_scenes(30, 8)
    rng = np.random.default_rng(0)
    assert all(not questions(scene, rng, "spatial") for scene in alone if len(scene.things) == 1)
    for scene in draw_scenes(20, 8, "dense"):
        shapes = Counter(thing.shape for thing in scene.things)
        assert len(questions(scene, rng, "colour", 9)) == sum(n == 1 for n in shapes.values())
