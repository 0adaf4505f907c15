"""Give the class token back the attention it had, without a change to what the patches say.

Training on scenes of every style left its attention on the package's own scenes less sharp than it had been. Here it is
held, on those scenes, to that of the tower before, in every layer that is used; on the others to what it is. Patch
features are held to what they are, with all patches and with gaps, so a language model that was trained on them, and
one that will be, see no other tower. No labels are used, and no method's scores.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from llm_accel.eval.tasks.vision.scenes import SPLITS, draw_scene
from training.vision_check import features_with_gaps
from training.vision_data import COUNTS, pack
from training.vision_init import USED_LAYERS
from training.vision_stage import Stage
from training.vision_world import draw_world

WARM_UP = 20  # steps
FEATURES = 20.0  # loss weight of the features over the attention


def class_attention(model: LlavaForConditionalGeneration, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The class token's attention, mean over heads, [layers, B, 101], and the patch features [B, 100, H]."""
    tower: Any = model.model.vision_tower
    seen = tower(pixels, output_attentions=True, output_hidden_states=True)
    rows = torch.stack([layer[:, :, 0].mean(1) for layer in seen.attentions[:USED_LAYERS]])
    return rows, seen.hidden_states[model.config.vision_feature_layer][:, 1:]


def hold(
    model: LlavaForConditionalGeneration, before: dict[str, Tensor], stage: Stage, seed: int, log: Callable[[str], None]
) -> None:
    """Train the tower of ``model``; ``before``: the weights of a model whose class token is to be followed."""
    begin, rng = time.time(), np.random.default_rng([seed, ord(stage.name[0])])
    now, old = copy.deepcopy(model), copy.deepcopy(model)
    old.load_state_dict(before)
    towers = [one.model.vision_tower for one in (model, now, old)]
    attention = towers[0].config._attn_implementation
    for tower in towers:
        tower.set_attn_implementation("eager")  # the others keep no attention weights
    optimizer = torch.optim.AdamW(towers[0].parameters(), lr=stage.lr, weight_decay=0.0)
    shown = []
    for step in range(stage.steps):
        rate = stage.lr * min(1.0, (step + 1) / WARM_UP)
        optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / stage.steps))
        many = step % 2
        own = round(stage.batch * (1 - stage.world))
        low, high = list(SPLITS.values())[many]
        scenes = [draw_scene(rng, int(rng.integers(low, high + 1))) for _ in range(own)]
        low, high = COUNTS["crowd" if many else "world"]
        scenes += [draw_world(rng, int(rng.integers(low, high + 1))) for _ in range(stage.batch - own)]
        pixels = pack(scenes, [[] for _ in scenes]).pixels
        leaves = torch.from_numpy(np.where(rng.random((len(scenes), 100)) < 0.6, rng.integers(0, USED_LAYERS), 9))
        with torch.no_grad():
            wanted, features = class_attention(now, pixels)
            wanted[:, :own] = class_attention(old, pixels[:own])[0]
            gaps = features_with_gaps(now, pixels, leaves)
        found, own_features = class_attention(model, pixels)
        of_rows = (wanted * (wanted.clamp_min(1e-9) / found.clamp_min(1e-9)).log()).sum(-1).mean()
        scale = features.var()
        of_features = (own_features - features).square().mean() / scale
        stays = leaves >= USED_LAYERS
        of_gaps = (features_with_gaps(model, pixels, leaves) - gaps)[stays].square().mean() / scale
        optimizer.zero_grad()
        (of_rows + FEATURES * (of_features + of_gaps)).backward()
        optimizer.step()
        shown.append([of_rows.item(), of_features.item(), of_gaps.item()])
        if step % 50 == 49 or step + 1 == stage.steps:
            names = ("attention", "features", "with gaps")
            means = "  ".join(f"{name} {mean:.4f}" for name, mean in zip(names, np.mean(shown, 0), strict=True))
            log(f"  {stage.name} step {step + 1}  {time.time() - begin:.0f} s  {means}")
            shown = []
    towers[0].set_attn_implementation(attention)
    log(f"{stage.name}: {stage.steps} steps of {stage.batch} scenes, {time.time() - begin:.0f} s")
