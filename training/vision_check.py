"""What the vision model can do: answers per task, and whether its class token looks at things."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from llm_accel.eval.tasks.vision.scenes import Scene
from training.vision_data import PREFIX, Batch, Subject, ask, pack
from training.vision_init import USED_LAYERS

HALVES = ("left or right?", "above or below?")  # ends of a question about one thing, asked in training alone
ROWS = 32  # scenes per forward pass
_EACH: dict[Subject, int] = {"existence": 6, "colour": 1, "shape": 1, "count": 1, "spatial": 1, "caption": 1}


def visual_features(model: LlavaForConditionalGeneration, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Class token [B, H] behind the last layer, patch features [B, 100, H] and the visual tokens [B, 100, H]."""
    seen = model.model.vision_tower(pixels, output_hidden_states=True)
    patches = seen.hidden_states[model.config.vision_feature_layer][:, 1:]
    return seen.pooler_output, patches, model.model.multi_modal_projector(patches)


def features_with_gaps(model: LlavaForConditionalGeneration, pixels: Tensor, leaves: Tensor) -> Tensor:
    """Patch features [B, 100, H] of a tower that patches leave on the way; those of patches that left mean nothing.

    ``leaves``: int64 [B, 100], the tower layer behind which a patch leaves, so that no later layer sees it.
    """
    tower: Any = model.model.vision_tower
    hidden: Tensor = tower.pre_layrnorm(tower.embeddings(pixels))
    seen = torch.ones(leaves.shape[0], 1, 1, 1 + leaves.shape[1], dtype=torch.bool)
    for i, layer in enumerate(tower.encoder.layers[:USED_LAYERS]):
        seen[:, 0, 0, 1:] = leaves >= i
        hidden = layer(hidden, attention_mask=torch.where(seen, 0.0, torch.finfo(hidden.dtype).min))
    return hidden[:, 1:]


def answer_logits(model: LlavaForConditionalGeneration, batch: Batch, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [n, V] and labels [n] of all answer tokens of a batch."""
    embeddings = model.model.language_model.embed_tokens(batch.ids)
    embeddings = torch.cat([embeddings[:, :1], tokens.to(embeddings.dtype), embeddings[:, PREFIX:]], 1)
    hidden = model.model.language_model(
        inputs_embeds=embeddings, position_ids=batch.positions, attention_mask=batch.mask, use_cache=False
    ).last_hidden_state
    wanted = batch.labels[:, 1:] >= 0
    return model.lm_head(hidden[:, :-1][wanted]), batch.labels[:, 1:][wanted]


def right_answers(batch: Batch, logits: Tensor, labels: Tensor) -> dict[str, list[bool]]:
    """Whether each question was answered word for word, by task (existence: also by POPE's split).

    A greedy answer is right exactly when every answer token is the argmax given the true ones before it.
    """
    hit = (logits.argmax(-1) == labels).tolist()
    results: dict[str, list[bool]] = {}
    at = 0
    for _, start, end, question in batch.spans:
        right = all(hit[at : at + end - start])
        at += end - start
        task = "half" if question.prompt.endswith(HALVES) else question.task
        for name in [task, f"{task}/{question.split}"][: 1 + bool(question.split)]:
            results.setdefault(name, []).append(right)
    return results


@torch.inference_mode()
def accuracy(
    model: LlavaForConditionalGeneration, scenes: Sequence[Scene], seed: int, shown: str = "all"
) -> dict[str, float]:
    """Share of questions answered word for word, by task, at most one per task and scene (existence: six).

    ``shown``: which visual tokens the language model sees: ``all``, ``things`` (those a thing covers), ``early`` (the
    same, and the others left the tower behind its first layer) or ``none``.
    """
    rng = np.random.default_rng(seed)
    results: dict[str, list[bool]] = {}
    for i in range(0, len(scenes), ROWS):
        rows = scenes[i : i + ROWS]
        asked = [ask(scene, rng, _EACH) for scene in rows]
        covered = torch.from_numpy(np.stack([scene.patches.ravel() for scene in rows]))
        hidden = {"all": None, "things": ~covered, "early": ~covered, "none": torch.ones_like(covered)}[shown]
        batch = pack(rows, asked, hidden)
        if shown == "early":
            patches = features_with_gaps(model, batch.pixels, torch.where(covered, USED_LAYERS, 0))
            tokens = model.model.multi_modal_projector(patches)
        else:
            tokens = visual_features(model, batch.pixels)[2]
        for name, right in right_answers(batch, *answer_logits(model, batch, tokens)).items():
            results.setdefault(name, []).extend(right)
    return {name: float(np.mean(right)) for name, right in sorted(results.items())}


@torch.inference_mode()
def saliency(model: LlavaForConditionalGeneration, scenes: Sequence[Scene]) -> float:
    """AUC of the class token's attention in the tower's penultimate layer against patches that a thing covers.

    The mean over images of the probability that a covered patch gets more attention than a bare one.
    """
    tower = model.model.vision_tower
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")  # the others keep no attention weights
    try:
        pixels = pack(scenes, [[] for _ in scenes]).pixels
        seen = tower(pixels, output_attentions=True).attentions[-2][:, :, 0, 1:].mean(1)
    finally:
        tower.set_attn_implementation(before)
    areas = []
    for scene, attention in zip(scenes, seen, strict=True):
        covered = torch.from_numpy(scene.patches.ravel())
        above = attention[covered][:, None] - attention[~covered]
        areas.append(float(((above > 0).float() + 0.5 * (above == 0).float()).mean()))
    return float(np.mean(areas))
