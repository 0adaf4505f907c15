"""Train the bundled vision model from nothing: ``python -m training.train_vision --out DIR``.

One command, one CPU thread, a fixed seed: two models with tokenizer and processor, and a log with the wall time of each
stage, land in DIR. Every stage has its own seed and its own optimizer, so that ``--start`` goes on from the weights a
stage left to exactly the weights that a run in one go gives.

The tower learns first, from what its class token and its patches should say of the image (see
:class:`~training.vision_init.Heads`): without that it takes far longer, and its class token, which pruning
methods rely on, says nothing. The last two stages hide a random share of the background from the language model, the
last one also parts of things. Without them every choice of tokens, be it the best, breaks counting and captions, since
the model never saw an image with gaps; with them, robustness to removal is trained in. The weights before these stages
are kept beside the last ones for that reason.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from transformers import GenerationConfig, LlavaForConditionalGeneration

from llm_accel.eval.tasks.vision.scenes import COLOURS, PATCH, SHAPES, SIZE, SPLITS, Scene, draw_scene
from training.vision_check import (
    accuracy,
    answer_logits,
    features_with_gaps,
    right_answers,
    saliency,
    visual_features,
)
from training.vision_data import Batch, Subject, ask, draw_scenes, pack, patch_classes
from training.vision_init import (
    BOS,
    EOS,
    PAD,
    USED_LAYERS,
    WORDS,
    Heads,
    build_processor,
    model_config,
    split_parameters,
)

PRESENT = 4.0  # loss weight of a pair that is there over one that is not
BACKGROUND = 0.15  # loss weight of a background patch over one of a thing
MUON_FACTOR = 3.0  # Muon's learning rate over AdamW's
STAYS = USED_LAYERS  # where a patch that no layer loses leaves
WARM_UP = 50  # steps
FLOOR = 0.05  # the learning rate falls to this share of itself along a cosine


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum."""

    name: str
    steps: int
    batch: int
    lr: float
    mix: Mapping[Subject, int] = field(default_factory=dict)  # questions per scene
    dense: float = 0.25  # share of the steps on dense scenes
    grow: int = 0  # steps over which standard scenes grow from one thing to four
    tower: float = 1.0  # loss weight of the tower's own tasks; 0 freezes it
    tower_only: float = 0.0  # share of the steps without questions
    hide: float = 0.0  # share of images that lose a random share of their background
    inside: float = 0.0  # share of these that lose it inside the tower, not behind it
    broken: float = 0.0  # share of the things in these that lose patches of their own
    edges: float = 0.0  # share of these that keep background patches with an edge of a thing on them


_FEW: dict[Subject, int] = {"caption": 1, "colour": 1, "shape": 1, "count": 1, "existence": 3, "half": 2, "spatial": 1}
_MANY: dict[Subject, int] = {"caption": 1, "colour": 2, "shape": 1, "count": 1, "existence": 4, "half": 1, "spatial": 3}

_WHERE: dict[Subject, int] = {
    "caption": 1,
    "colour": 1,
    "shape": 1,
    "count": 1,
    "existence": 2,
    "half": 4,
    "spatial": 5,
}

_SHORT: dict[Subject, int] = {
    "caption": 1,
    "colour": 1,
    "shape": 1,
    "count": 1,
    "existence": 2,
    "half": 1,
    "spatial": 2,
}

CURRICULUM: tuple[Stage, ...] = (
    Stage("A tower", 700, 32, 2e-3, dense=0.5, tower_only=1.0),
    Stage("B questions", 500, 16, 1.5e-3, _FEW, dense=0.0, grow=300, tower=0.5),
    Stage("C together", 900, 16, 1.2e-3, _MANY, dense=0.35, tower=0.5, tower_only=0.1),
    Stage("D places", 600, 16, 1.5e-3, _WHERE, dense=0.25, tower=0.0),
    Stage("E gaps", 1000, 16, 6e-4, _SHORT, dense=0.25, tower=0.0, hide=0.8, inside=0.5),
    Stage("F pieces", 700, 16, 4e-4, _SHORT, dense=0.25, tower=0.0, hide=0.8, inside=0.5, broken=0.12, edges=0.6),
)
PLAIN = "D places"  # the model after this stage is kept as well


def tower_loss(heads: Heads, batch: Batch, scene: Tensor, patches: Tensor) -> Tensor:
    """Loss of the class token on what is in the scene, and of the patch features on what each shows and where it is."""
    pairs = batch.pairs.unflatten(1, (len(SHAPES), len(COLOURS)))
    present = torch.cat([batch.pairs, pairs.amax(2), pairs.amax(1)], 1)
    logits = heads.scene(scene)
    of_scene = binary_cross_entropy_with_logits(logits, present, pos_weight=torch.full(logits.shape[1:], PRESENT))
    classes = heads.patch(patches).flatten(0, 1)
    weight = torch.ones(classes.shape[1])
    weight[0] = BACKGROUND
    line = torch.linspace(-1, 1, SIZE // PATCH)
    of_patches = cross_entropy(classes, batch.patches.flatten(), weight=weight)
    of_places = mse_loss(heads.place(patches), torch.cartesian_prod(line, line).expand(len(patches), -1, -1))
    return 2 * of_scene + of_patches + of_places


def draw_gaps(scenes: Sequence[Scene], rng: np.random.Generator, stage: Stage) -> Tensor:
    """The tower layer behind which each patch leaves, int64 [B, 100], or STAYS.

    A share ``stage.hide`` of the images loses a random share of its background, the square root of a uniform number,
    two thirds in the mean. ``stage.broken`` of the things in these lose a random share of their patches, all but one at
    most; in ``stage.edges`` of these images background patches with an edge of a thing on them stay. ``stage.inside``
    of these images lose patches from one random layer of the tower to another, a random part behind each, and the
    others all at once behind the last layer that is used.
    """
    number = len(scenes)
    bare = ~np.stack([scene.patches.ravel() for scene in scenes])
    share = np.where(rng.random(number) < stage.hide, rng.random(number) ** 0.5, 0.0)
    gone = bare & (rng.random(bare.shape) < share[:, None])
    span = np.sort(rng.integers(0, USED_LAYERS - 1, (number, 2)), axis=1)
    span[rng.random(number) >= stage.inside] = USED_LAYERS - 1
    layer = rng.integers(span[:, :1], span[:, 1:] + 1, bare.shape)
    if stage.broken:
        for row in np.flatnonzero(share).tolist():
            gone[row] |= _pieces(scenes[row], rng, stage.broken)
    if stage.edges:
        edge = bare & np.stack([scene.cover.ravel() > 0 for scene in scenes])
        gone &= ~(edge & (rng.random(number) < stage.edges)[:, None])
    return torch.from_numpy(np.where(gone, layer, STAYS))


def _pieces(scene: Scene, rng: np.random.Generator, broken: float) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which patches the things of a scene lose, bool [100]; a share ``broken`` of them loses any."""
    classes = patch_classes(scene)
    lost = np.zeros(classes.shape, bool)
    for thing in np.unique(classes[classes > 0]):
        patches = rng.permutation(np.flatnonzero(classes == thing))[1:]
        share = rng.random() if rng.random() < broken else 0.0
        lost[patches] = rng.random(len(patches)) < share
    return lost


class Loop:
    """The model, the seed and the log, shared by the stages."""

    def __init__(
        self, model: LlavaForConditionalGeneration, heads: Heads, seed: int, log: Callable[[str], None]
    ) -> None:
        self.model, self.heads, self.seed, self.log = model, heads, seed, log

    def batch(self, stage: Stage, step: int, rng: np.random.Generator) -> tuple[Batch, bool, Tensor | None]:
        """Scenes with questions, whether the step trains the tower alone, and where patches leave, if any do."""
        low, high = SPLITS["dense" if rng.random() < stage.dense else "standard"]
        if high == SPLITS["standard"][1] and step < stage.grow:
            high = 1 + high * step // stage.grow
        alone = bool(rng.random() < stage.tower_only)
        scenes = [draw_scene(rng, int(rng.integers(low, high + 1))) for _ in range(stage.batch)]
        asked = [[] if alone else ask(scene, rng, stage.mix) for scene in scenes]
        leaves = draw_gaps(scenes, rng, stage) if stage.hide else None
        return pack(scenes, asked, None if leaves is None else leaves < STAYS), alone, leaves

    def run(self, stage: Stage) -> None:
        """Train one stage."""
        begin = time.time()
        order = ord(stage.name[0])
        rng = np.random.default_rng([self.seed, order])
        torch.manual_seed(1000 * self.seed + order)
        tower = self.model.model.vision_tower
        tower.requires_grad_(stage.tower > 0)
        matrices, rest = split_parameters(self.model)
        everything = [*matrices, *rest, *self.heads.parameters()]
        optimizers: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.AdamW([*rest, *self.heads.parameters()], betas=(0.9, 0.98), weight_decay=0.01), 1.0),
            (torch.optim.Muon(matrices, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"), MUON_FACTOR),
        ]
        losses: dict[str, list[float]] = {}
        right: dict[str, list[bool]] = {}
        for step in range(stage.steps):
            rate = stage.lr * min(1.0, (step + 1) / WARM_UP)
            rate *= FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * step / stage.steps))
            for optimizer, factor in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = factor * rate
            batch, alone, leaves = self.batch(stage, step, rng)
            scene = None
            with torch.set_grad_enabled(stage.tower > 0):
                if leaves is None:
                    scene, patches, _ = visual_features(self.model, batch.pixels)
                else:
                    patches = features_with_gaps(self.model, batch.pixels, leaves)
            loss = torch.zeros(())
            if stage.tower and scene is not None:
                loss = tower_loss(self.heads, batch, scene, patches)
                losses.setdefault("tower", []).append(loss.item())
                loss = loss * (1.0 if alone else stage.tower)
            if not alone:
                logits, labels = answer_logits(self.model, batch, self.model.model.multi_modal_projector(patches))
                answers = cross_entropy(logits, labels)
                losses.setdefault("answers", []).append(answers.item())
                loss = loss + answers
                for name, results in right_answers(batch, logits, labels).items():
                    right.setdefault(name, []).extend(results)
            for parameter in everything:
                parameter.grad = None
            loss.backward()
            nn.utils.clip_grad_norm_(everything, 1.0)
            for optimizer, _ in optimizers:
                optimizer.step()
            if step % 50 == 49 or step + 1 == stage.steps:
                means = {name: np.mean(x) for name, x in losses.items()} | {
                    name: np.mean(x) for name, x in right.items()
                }
                shown = "  ".join(f"{name} {mean:.3f}" for name, mean in means.items() if "/" not in name)
                self.log(f"  {stage.name} step {step + 1}  {time.time() - begin:.0f} s  {shown}")
                losses, right = {}, {}
        tower.requires_grad_(True)
        self.log(f"{stage.name}: {stage.steps} steps of {stage.batch} scenes, {time.time() - begin:.0f} s")


def save(model: LlavaForConditionalGeneration, out: Path) -> None:
    """Write bf16 weights, configuration, tokenizer and processor as a model directory."""
    clone = LlavaForConditionalGeneration(model_config())
    clone.load_state_dict(model.state_dict())
    clone.to(torch.bfloat16)  # type: ignore[arg-type]  # stubs take the method for a wrapped function
    bos, eos, pad = (WORDS.index(token) for token in (BOS, EOS, PAD))
    clone.generation_config = GenerationConfig(bos_token_id=bos, eos_token_id=eos, pad_token_id=pad, do_sample=False)
    clone.save_pretrained(out)
    build_processor().save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)


def validate(model: LlavaForConditionalGeneration, log: Callable[[str], None], number: int = 400) -> None:
    """Log what the model can do on fresh scenes of both splits."""
    for split in SPLITS:
        scenes = draw_scenes(number, 10_000, split)
        for shown in ("all", "things", "early", "none"):
            found = accuracy(model, scenes, 10_000, shown)
            log(f"{split}, visual tokens: {shown}: " + ", ".join(f"{name} {x:.3f}" for name, x in found.items()))
        log(f"{split}, class token's attention against patches of things: AUC {saliency(model, scenes[:100]):.3f}")


def train(out: Path, seed: int, start: str) -> None:
    """The curriculum from a stage on; writes the models, the weights after each stage and ``train.log`` to ``out``."""
    (out / "stages").mkdir(parents=True, exist_ok=True)
    begin = time.time()
    names = [stage.name[0] for stage in CURRICULUM]
    first = names.index(start)
    with (out / "train.log").open("a" if first else "w", buffering=1) as file:

        def log(line: str) -> None:
            print(line, file=sys.stderr, flush=True)
            file.write(line + "\n")

        torch.manual_seed(seed)
        model, heads = LlavaForConditionalGeneration(model_config()), Heads()
        log(
            f"seed {seed}, {model.num_parameters():,} parameters, {torch.get_num_threads()} thread(s), torch "
            f"{torch.__version__}, transformers {transformers.__version__}, {platform.machine()}"
        )
        if first:
            weights = torch.load(out / "stages" / f"{names[first - 1]}.pt", weights_only=True)
            model.load_state_dict(weights["model"])
            heads.load_state_dict(weights["heads"])
            log(f"start at stage {start}, from the weights after stage {names[first - 1]}")
        loop = Loop(model.train(), heads, seed, log)
        for stage in CURRICULUM[first:]:
            loop.run(stage)
            weights = {"model": model.state_dict(), "heads": heads.state_dict()}
            torch.save(weights, out / "stages" / f"{stage.name[0]}.pt")
            if stage.name == PLAIN:
                save(model, out / "plain")
                validate(model.train(False), log)
                model.train()
        save(model.train(False), out)
        validate(model, log)
        log(f"total: {time.time() - begin:.0f} s")


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description="Train the bundled vision model from nothing.")
    parser.add_argument("--out", type=Path, required=True, help="directory for models, weights per stage and train.log")
    parser.add_argument("--seed", type=int, default=0, help="seed of initialisation and data")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; another number gives other weights")
    parser.add_argument(
        "--start", default="A", choices=[stage.name[0] for stage in CURRICULUM], help="stage to start at, from stages/"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args.out, args.seed, args.start)


if __name__ == "__main__":
    main()
