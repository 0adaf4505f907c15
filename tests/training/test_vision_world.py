"""Training scenes of every style: what they hold is where and what their annotations say."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from llm_accel.eval.tasks.vision.questions import NUMBERS, questions
from llm_accel.eval.tasks.vision.scenes import COLOURS, SHAPES
from training.train_vision import CURRICULUM, HOLD
from training.vision_data import ask, draw_scenes, patch_classes
from training.vision_hold import class_attention, hold
from training.vision_init import model_config
from training.vision_shapes import form, paint
from training.vision_world import APART, ROW, World


@pytest.fixture(scope="module")
def worlds() -> list[World]:
    found = draw_scenes(80, 3, "world") + draw_scenes(40, 4, "crowd")
    assert all(isinstance(scene, World) for scene in found)
    return found  # type: ignore[return-value]


def centre(scene: World, index: int) -> tuple[float, float]:
    top, left, bottom, right = scene.things[index].box
    return (top + bottom) / 2, (left + right) / 2


def test_the_same_seed_draws_the_same_scenes(worlds: list[World]) -> None:
    again = draw_scenes(80, 3, "world")
    assert all((a.image == b.image).all() and a.things == b.things for a, b in zip(worlds, again, strict=False))
    assert any((a.image != b.image).any() for a, b in zip(worlds, draw_scenes(80, 5, "world"), strict=False))


def test_every_thing_shows_and_has_a_patch(worlds: list[World]) -> None:
    for scene in worlds:
        assert set(np.unique(scene.owner)) - {0} == set(range(1, 1 + len(scene.things)))
        classes = set(patch_classes(scene))
        assert classes == {0} | {1 + thing.pair for thing in scene.things} or len(scene.things) > 6
        for i, thing in enumerate(scene.things):
            ys, xs = np.nonzero(scene.owner == i + 1)
            top, left, bottom, right = thing.box
            assert top <= ys.min() and ys.max() < bottom and left <= xs.min() and xs.max() < right


def test_reading_order_is_that_of_the_rows_and_asked_where_they_are_clear(worlds: list[World]) -> None:
    rng = np.random.default_rng(0)
    for scene in worlds:
        order = [(thing.row, thing.column) for thing in scene.things]
        assert order == sorted(order)
        captions = ask(scene, rng, {"caption": 1})
        assert len(captions) == scene.clear
        if scene.clear and len({row for row, _ in order}) > 1:
            rows = [
                [centre(scene, i)[0] for i, (row, _) in enumerate(order) if row == r] for r in range(order[-1][0] + 1)
            ]
            means = [np.mean(row) for row in rows]
            assert (np.diff(means) > APART - ROW).all()
    assert 0.4 < np.mean([scene.clear for scene in worlds]) < 1


def test_answers_hold_in_pixels(worlds: list[World]) -> None:
    rng = np.random.default_rng(1)
    seen = set()
    for scene in worlds:
        places = {f"{t.colour} {t.shape}": centre(scene, i) for i, t in enumerate(scene.things)}
        for question in ask(scene, rng, {"spatial": 3, "count": 1, "half": 2}):
            seen.add(question.answer)
            if question.task == "count":
                assert question.answer == NUMBERS[len(scene.things) - 1]
                continue
            words = question.prompt.removesuffix("?").split()
            y, x = places[f"{words[3]} {words[4]}"]
            other_y, other_x = places[" ".join(words[-2:])] if words[-3] == "the" else (40.0, 40.0)
            right = {"left": x < other_x, "right": x > other_x, "above": y < other_y, "below": y > other_y}
            assert right[question.answer], (question, places)
    assert {"left", "right", "above", "below", "one", "twelve"} <= seen


def test_on_the_packages_scenes_places_are_asked_as_the_package_asks() -> None:
    for scene in draw_scenes(40, 1) + draw_scenes(10, 2, "dense"):
        own = set(ask(scene, np.random.default_rng(0), {"spatial": 999}))
        assert own == set(questions(scene, np.random.default_rng(0), "spatial", 999))


def test_colours_stay_apart() -> None:
    rng = np.random.default_rng(0)
    means = {}
    for colour, name in enumerate(COLOURS):
        drawn = np.stack([paint(rng, colour) for _ in range(200)])
        assert drawn.min() >= 0 and drawn.max() <= 1
        means[name] = drawn.mean(0)
    assert means["red"].argmax() == 0 and means["green"].argmax() == 1 and means["blue"].argmax() == 2
    assert means["white"].min() > 0.85
    names = list(means)
    gaps = [np.abs(means[a] - means[b]).max() for a in names for b in names if a < b]
    assert min(gaps) > 0.2


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_fill_what_they_should(shape: str) -> None:
    rng, line = np.random.default_rng(0), np.linspace(-1.8, 1.8, 120)
    x, y = np.meshgrid(line, line)
    low, high = {
        "circle": (2.4, 4.0),
        "square": (1.8, 4.2),
        "triangle": (0.9, 2.5),
        "cross": (0.8, 2.9),
        "star": (0.7, 2.1),
    }[shape]
    for _ in range(50):
        inside = form(rng, shape, False, 1.0).inside(x, y)
        assert inside[60, 60]
        assert low < inside.mean() * 3.6**2 < high


def test_the_class_token_follows_the_tower_before_and_patches_stay() -> None:
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(model_config())
    other = LlavaForConditionalGeneration(model_config())
    pixels = torch.randn(2, 3, 80, 80)
    stage = replace(next(stage for stage in CURRICULUM if stage.name == HOLD), steps=30, batch=4, lr=3e-3)
    before = copy.deepcopy(model.state_dict())
    distance = []
    lines: list[str] = []
    attention = model.model.vision_tower.config._attn_implementation
    for run in range(2):
        model.model.vision_tower.set_attn_implementation("eager")
        other.model.vision_tower.set_attn_implementation("eager")
        with torch.no_grad():
            distance.append((class_attention(model, pixels)[0] - class_attention(other, pixels)[0]).abs().mean().item())
        model.model.vision_tower.set_attn_implementation(attention)
        if run == 0:
            hold(model, other.state_dict(), stage, 0, lines.append)
    assert model.model.vision_tower.config._attn_implementation == attention
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed and all(name.startswith("model.vision_tower") for name in changed)
    assert distance[1] < distance[0] and len(lines) == 2
