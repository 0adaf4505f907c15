"""Training of the vision model: going on from a stage's weights is the same as never having stopped."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration

from training.train_vision import CURRICULUM, FEW, FOLLOWED, HOLD, PLAIN, STAYS, Loop, draw_gaps
from training.vision_data import draw_scenes, patch_classes
from training.vision_init import USED_LAYERS, Heads, model_config

TOWER, GAPS = (replace(CURRICULUM[i], steps=2, batch=2) for i in (2, -1))


def test_a_stage_needs_only_the_weights_before_it() -> None:
    torch.manual_seed(0)
    model, heads, lines = LlavaForConditionalGeneration(model_config()), Heads(), list[str]()
    before = copy.deepcopy(model.state_dict())
    loop = Loop(model.train(), heads, 7, lines.append)
    loop.run(TOWER)
    between = copy.deepcopy((model.state_dict(), heads.state_dict()))
    loop.run(GAPS)

    torch.manual_seed(1)
    other, other_heads = LlavaForConditionalGeneration(model_config()), Heads()
    other.load_state_dict(between[0])
    other_heads.load_state_dict(between[1])
    Loop(other.train(), other_heads, 7, lines.append).run(GAPS)

    changed = 0
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name
        frozen = torch.equal(weight, between[0][name])
        assert frozen or not name.startswith("model.vision_tower"), name
        changed += not torch.equal(weight, before[name]) and not frozen
    assert changed > 60
    assert any("existence" in line for line in lines)


def test_gaps_are_background_and_open_in_the_tower_or_behind_it() -> None:
    rng = np.random.default_rng(0)
    scenes = draw_scenes(200, 3)
    leaves = draw_gaps(scenes, rng, replace(GAPS, hide=0.8, broken=0.0, few=0.0)).numpy()
    things = np.stack([scene.patches.ravel() for scene in scenes])
    assert (leaves[things] == STAYS).all()
    left = [row[row < STAYS] for row in leaves]
    lost = [row for row in left if len(row)]
    assert 0.7 < len(lost) / len(scenes) < 0.9
    behind = [row for row in lost if (row == USED_LAYERS - 1).all()]
    inside = [row for row in lost if (row < USED_LAYERS - 1).all()]
    assert len(behind) + len(inside) == len(lost) and 0.35 < len(inside) / len(lost) < 0.65
    assert {len(set(row)) for row in inside} == {1, 2, 3}  # all at once, or step by step
    assert set(np.concatenate(inside)) == set(range(USED_LAYERS - 1))
    shares = sorted(len(row) / (~bare).sum() for row, bare in zip(left, things, strict=True) if len(row))
    assert shares[0] < 0.2 and shares[-1] > 0.9 and 0.6 < np.mean(shares) < 0.73


def test_pieces_are_taken_from_some_things_and_never_all() -> None:
    scenes = draw_scenes(200, 3)
    leaves = draw_gaps(scenes, np.random.default_rng(0), replace(GAPS, hide=0.8, broken=0.25, few=0.0)).numpy()
    broken = []
    for scene, row in zip(scenes, leaves, strict=True):
        classes = patch_classes(scene)
        whole = (row == STAYS).all()
        kept = [(row[classes == 1 + thing.pair] == STAYS).mean() for thing in scene.things]
        assert min(kept) > 0
        broken += [] if whole else [share < 1 for share in kept]
    assert 0.1 < np.mean(broken) < 0.25  # a small share may take nothing


def test_a_few_patches_of_each_thing_stay_and_nothing_else() -> None:
    scenes = draw_scenes(100, 3, "world")
    leaves = draw_gaps(scenes, np.random.default_rng(0), replace(GAPS, hide=1.0, few=1.0)).numpy()
    numbers = []
    for scene, row in zip(scenes, leaves, strict=True):
        classes = patch_classes(scene)
        assert (row[classes == 0] < STAYS).all()
        numbers += [(row[classes == thing] == STAYS).sum() for thing in np.unique(classes[classes > 0])]
    assert set(numbers) == set(range(1, FEW + 1))


def test_the_model_before_gaps_is_the_one_kept_beside() -> None:
    assert [stage.name for stage in CURRICULUM if stage.hide == 0][-1] == PLAIN
    gaps = [stage.hide > 0 for stage in CURRICULUM]
    assert gaps == sorted(gaps) and sum(gaps) == 3


def test_letters_name_one_stage_each() -> None:
    letters = [stage.name[0] for stage in CURRICULUM]
    assert len(set(letters)) == len(letters)
    assert letters.index(FOLLOWED[0]) < letters.index(HOLD[0])
