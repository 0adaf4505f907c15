"""``llm-accel calibrate dyvte``: after which layer visual tokens may leave, and routers that choose it per prompt."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_accel.calibrate.dyvte import Calibration, calibrate_dyvte
from llm_accel.calibrate.dyvte.calibration import CONFIDENCE, EPSILON, MAX_NEW_TOKENS, ROUTER_DIM
from llm_accel.calibrate.dyvte.runs import FIELDS
from llm_accel.calibrate.dyvte.samples import process_pairs, read_pairs, scene_pairs
from llm_accel.common.arguments import ModelOptions, OutputOptions
from llm_accel.common.loading import load_vision_model
from llm_accel.common.options import option
from llm_accel.errors import ConfigError, unknown_name
from llm_accel.eval.records import RunDir
from llm_accel.eval.runner import print_summary
from llm_accel.eval.table import aligned, number
from llm_accel.eval.tasks.vision.settings import SCENES
from llm_accel.eval.tasks.vision.task import model_name
from llm_accel.methods.visual.exit_profile import samples_needed

METHODS = ("dyvte",)


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(OutputOptions, ModelOptions):
    """Options of the command; numbers are checked by :func:`calibrate_dyvte`."""

    model: str | None = option("HuggingFace model (default: the bundled vision model)", None, metavar="ID|PATH")
    attn: str | None = option("", None, flag="")
    data: str | None = option(
        'JSON Lines: {"image": PATH, "prompt": TEXT, "answer": TEXT}, answer optional; or generated scenes (the '
        "bundled model's default)",
        None,
        metavar="FILE|scenes",
    )
    num_samples: int = option("maximum number of samples", 256, least=1)
    epsilon: float = option("fraction of all prompts like these whose answer may change", EPSILON, metavar="X")
    confidence: float = option("with which no more of them change", CONFIDENCE, metavar="X")
    slack: float = option("increase of the loss that is always allowed, in nats per token", 0.0, metavar="X")
    routers: bool = option("train routers as well", True)
    router_dim: int = option("width of a router", ROUTER_DIM)
    max_new_tokens: int = option("length of the model's own answers, where none is given", MAX_NEW_TOKENS)
    seed: int = option("seed of routers and scenes", 0, least=0)
    out: str | None = option("default: runs/dyvte-<model>", None, metavar="DIR", group="output")
    overwrite: bool = option("start over in --out instead of resuming", False, group="output")
    plot: bool = option("", False, flag="")

    def validate(self) -> None:
        if self.data is None and self.model is not None:
            raise ConfigError(f"--data is missing; give a file with images and prompts for {self.model!r}.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is calibrated, and how."""
    parser.add_argument("method", metavar="METHOD", help=f"what is calibrated: {', '.join(METHODS)}")
    CalibrateOptions.add_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Calibrates, writes dyvte.json and routers.safetensors, prints a table and one JSON line, and returns that.

    Raises:
        LlmAccelError: anything wrong with the arguments.
    """
    if args.method not in METHODS:
        raise ConfigError(unknown_name("method to calibrate", args.method, METHODS))
    options = CalibrateOptions.from_arguments(args)
    pairs = None if options.data in (SCENES, None) else read_pairs(options.data)
    model, processor, options = load_vision_model(options)
    name = Path(options.model).name if options.model else "bundled"
    out = Path(options.out) if options.out else Path("runs") / f"dyvte-{name}"
    wanted = options.num_samples if pairs is None else min(options.num_samples, len(pairs))
    found = calibrate_dyvte(
        model,
        process_pairs(processor, scene_pairs(wanted, options.seed) if pairs is None else pairs),
        num_samples=wanted,
        epsilon=options.epsilon,
        confidence=options.confidence,
        slack=options.slack,
        routers=options.routers,
        router_dim=options.router_dim,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
        out=out,
        overwrite=options.overwrite,
        name=model_name(options.model),
    )
    summary = _summary(found, out)
    RunDir(out, FIELDS).write_summary(summary)
    print_summary(summary, None if options.json_only else _table(found))
    return summary


def _summary(found: Calibration, out: Path) -> dict[str, Any]:
    profile = found.profile
    return {
        "command": "calibrate dyvte",
        "model": profile.model,
        "layers": profile.layers,
        "exit": profile.exit,
        "epsilon": profile.epsilon,
        "confidence": profile.confidence,
        "samples": profile.samples,
        "safe_rate": {str(one.layer): one.safe_rate for one in profile.per_layer},
        "changed_at_most": {str(one.layer): one.changed_at_most for one in profile.per_layer},
        "routed_safe_rate": None if found.routed is None else found.routed[0],
        "routed_mean_layer": None if found.routed is None else found.routed[1],
        "out": str(out),
    }


def _table(found: Calibration) -> str:
    """Results per exit layer."""
    profile = found.profile
    scores = {score.layer: score for score in profile.routers}
    header = [
        "layer",
        "safe",
        "changed at most",
        "same tokens",
        "loss",
        *(["router: exits", "precision", "recall"] if scores else []),
    ]
    rows = [header]
    for one in profile.per_layer:
        routed = scores.get(one.layer)
        shares = [] if routed is None else [routed.exits, routed.precision, routed.recall]
        bound = number(one.changed_at_most, ".1%")
        measured = [str(one.layer), f"{one.safe_rate:.1%}", bound, f"{one.agreement:.1%}", f"{one.loss:.4f}"]
        rows.append([*measured, *(number(share, ".1%") for share in shares)])
    lines = aligned(rows)
    last = profile.exit == profile.layers - 1
    chosen = (
        "no layer is safe enough: visual tokens stay" if last else f"visual tokens leave after layer {profile.exit}"
    )
    confidence = profile.confidence or CONFIDENCE
    lines.append(
        f"{chosen} ({profile.samples} samples; with {confidence:.0%} confidence at most {profile.epsilon:.0%} of "
        f"all such prompts change; full model: loss {profile.loss:.4f})"
    )
    needed = samples_needed(profile.epsilon, confidence)
    if needed is None or profile.samples < needed:
        enough = "no number of samples proves that none changes" if needed is None else f"{needed} are needed"
        lines.append(f"too few samples for any layer to be trusted: {enough}; raise --num-samples or --epsilon")
    if found.routed is not None:
        lines.append(f"routers together: {found.routed[0]:.1%} safe, exit after layer {found.routed[1]:.1f} on average")
    return "\n".join(lines)
