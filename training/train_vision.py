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
from collections.abc import Callable, Sequence
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
from training.vision_data import COUNTS, Batch, Kind, Subject, ask, draw_scenes, pack, patch_classes
from training.vision_hold import hold
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
from training.vision_stage import Stage
from training.vision_world import draw_world

PRESENT = 4.0  # loss weight of a pair that is there over one that is not
BACKGROUND = 0.15  # loss weight of a background patch over one of a thing
MUON_FACTOR = 3.0  # Muon's learning rate over AdamW's
STAYS = USED_LAYERS  # where a patch that no layer loses leaves
FEW = 4  # patches of a thing, at most, in images that keep little else
WARM_UP = 50  # steps
FLOOR = 0.05  # the learning rate falls to this share of itself along a cosine


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
    Stage("E tower, world", 1300, 32, 1.5e-3, dense=0.4, world=0.75, tower_only=1.0),
    Stage("F world", 1200, 16, 1.2e-3, _MANY, dense=0.25, world=0.7, tower=0.5, tower_only=0.1),
    Stage("T class token", 300, 28, 5e-4, world=0.43),
    Stage("G gaps", 700, 16, 6e-4, _SHORT, dense=0.25, world=0.65, tower=0.0, hide=0.8, inside=0.5),
    Stage(
        "H pieces",
        600,
        16,
        4e-4,
        _SHORT,
        dense=0.25,
        world=0.65,
        tower=0.0,
        hide=0.8,
        inside=0.5,
        broken=0.12,
        edges=0.6,
        few=0.2,
    ),
    Stage(
        "J settle",
        550,
        16,
        6e-4,
        _SHORT,
        dense=0.35,
        world=0.4,
        tower=0.0,
        hide=0.75,
        inside=0.5,
        broken=0.1,
        edges=0.6,
        few=0.1,
    ),
)
PLAIN = "T class token"  # the model after this stage is kept as well
HOLD = PLAIN  # this stage is :func:`~training.vision_hold.hold`, which follows the weights after that one
FOLLOWED = "D places"


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
    most; in ``stage.edges`` of these images background patches with an edge of a thing on them stay. In ``stage.few``
    of them nothing stays but 1 to :data:`FEW` patches of each thing. ``stage.inside``
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
    if stage.few:
        for row in np.flatnonzero((share > 0) & (rng.random(number) < stage.few)).tolist():
            gone[row] = bare[row] | _rest(scenes[row], rng)
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


def _rest(scene: Scene, rng: np.random.Generator) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """The patches of things but for 1 to FEW of each, bool [100]."""
    classes = patch_classes(scene)
    lost = classes > 0
    for thing in np.unique(classes[lost]):
        patches = rng.permutation(np.flatnonzero(classes == thing))
        lost[patches[: rng.integers(1, FEW + 1)]] = False
    return lost


def _scene(rng: np.random.Generator, stage: Stage, step: int, many: bool) -> Scene:
    """A scene of few things or many."""
    if stage.world and rng.random() < stage.world:
        low, high = COUNTS["crowd" if many else "world"]
        return draw_world(rng, int(rng.integers(low, high + 1)))
    low, high = SPLITS["dense" if many else "standard"]
    if not many and step < stage.grow:
        high = 1 + high * step // stage.grow
    return draw_scene(rng, int(rng.integers(low, high + 1)))


class Loop:
    """The model, the seed and the log, shared by the stages."""

    def __init__(
        self, model: LlavaForConditionalGeneration, heads: Heads, seed: int, log: Callable[[str], None]
    ) -> None:
        self.model, self.heads, self.seed, self.log = model, heads, seed, log

    def batch(self, stage: Stage, step: int, rng: np.random.Generator) -> tuple[Batch, bool, Tensor | None]:
        """Scenes with questions, whether the step trains the tower alone, and where patches leave, if any do."""
        many = bool(rng.random() < stage.dense)
        alone = bool(rng.random() < stage.tower_only)
        scenes = [_scene(rng, stage, step, many) for _ in range(stage.batch)]
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
    """Log what the model can do on fresh scenes of every kind."""
    kinds: tuple[Kind, ...] = tuple(COUNTS)
    for kind in kinds:
        scenes = draw_scenes(number, 10_000, kind)
        for shown in ("all", "things", "early", "none"):
            found = accuracy(model, scenes, 10_000, shown)
            log(f"{kind}, visual tokens: {shown}: " + ", ".join(f"{name} {x:.3f}" for name, x in found.items()))
        log(f"{kind}, class token's attention against patches of things: AUC {saliency(model, scenes[:100]):.3f}")


def train(out: Path, seed: int, start: str, end: str) -> None:
    """The curriculum from one stage to another; writes the models, the weights after each stage and ``train.log`` to
    ``out``."""
    (out / "stages").mkdir(parents=True, exist_ok=True)
    begin = time.time()
    names = [stage.name[0] for stage in CURRICULUM]
    first, last = names.index(start), names.index(end)
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
        for stage in CURRICULUM[first : last + 1]:
            if stage.name == HOLD:
                followed = torch.load(out / "stages" / f"{FOLLOWED[0]}.pt", weights_only=True)["model"]
                hold(model, followed, stage, seed, log)
            else:
                loop.run(stage)
            weights = {"model": model.state_dict(), "heads": heads.state_dict()}
            torch.save(weights, out / "stages" / f"{stage.name[0]}.pt")
            if stage.name == PLAIN:
                save(model, out / "plain")
                validate(model.train(False), log)
                model.train()
        if end == names[-1]:
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
    parser.add_argument(
        "--end", default=CURRICULUM[-1].name[0], choices=[stage.name[0] for stage in CURRICULUM], help="last stage"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args.out, args.seed, args.start, args.end)


if __name__ == "__main__":
    main()
