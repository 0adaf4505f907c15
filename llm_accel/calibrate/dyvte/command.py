"""``llm-accel calibrate dyvte``: after which layer visual tokens may leave, and routers that choose it per prompt."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from llm_accel.calibrate.dyvte import Calibration, calibrate_dyvte
from llm_accel.calibrate.dyvte.calibration import EPSILON, MAX_NEW_TOKENS, ROUTER_DIM
from llm_accel.calibrate.dyvte.runs import CalibrationDir
from llm_accel.calibrate.dyvte.samples import processed, read_pairs
from llm_accel.calibrate.dyvte.scenes import scene_pairs
from llm_accel.common.arguments import add_place
from llm_accel.errors import ConfigError, unknown_name
from llm_accel.eval.tasks.vision.loading import load_model, model_name
from llm_accel.eval.tasks.vision.settings import SCENES, Settings

METHODS = ("dyvte",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command; values are checked in :func:`run`."""
    parser.add_argument("method", metavar="METHOD", help=f"what is calibrated: {', '.join(METHODS)}")
    parser.add_argument("--model", metavar="ID|PATH", help="HuggingFace model (default: the bundled vision model)")
    parser.add_argument(
        "--data",
        metavar="FILE|scenes",
        help='JSON Lines: {"image": PATH, "prompt": TEXT, "answer": TEXT}, answer optional; or drawn scenes (the '
        "bundled model's default)",
    )
    parser.add_argument(
        "--num-samples", type=int, default=256, metavar="N", help="samples at most (default: %(default)s)"
    )
    parser.add_argument("--out", metavar="DIR", help="default: runs/dyvte-<model>")
    parser.add_argument(
        "--epsilon",
        type=float,
        default=EPSILON,
        metavar="X",
        help="share of the samples that may change their answer (default: %(default)s)",
    )
    parser.add_argument(
        "--slack",
        type=float,
        default=0.0,
        metavar="X",
        help="nats per token by which a loss may always grow (default: 0)",
    )
    parser.add_argument("--routers", action=argparse.BooleanOptionalAction, default=True, help="train routers as well")
    parser.add_argument(
        "--router-dim", type=int, default=ROUTER_DIM, metavar="N", help="width of a router (default: %(default)s)"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=MAX_NEW_TOKENS,
        metavar="N",
        help="of the model's own answers, where none is given (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of routers and scenes (default: %(default)s)")
    add_place(parser, attention=False)
    parser.add_argument("--overwrite", action="store_true", help="start anew in --out instead of going on")
    parser.add_argument("--json-only", action="store_true", help="no table on stdout, only the JSON line")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Calibrates, writes dyvte.json and routers.safetensors, prints a table and one JSON line, and returns that.

    Raises:
        LlmAccelError: anything wrong with the arguments.
    """
    if args.method not in METHODS:
        raise ConfigError(unknown_name("method to calibrate", args.method, METHODS))
    settings = Settings(
        model=args.model, samples=args.num_samples, dtype=args.dtype, device=args.device, seed=args.seed
    )
    if args.data is None and args.model is not None:
        raise ConfigError(f"--data is missing; give a file with images and prompts as {args.model!r} will see them.")
    pairs = None if args.data in (SCENES, None) else read_pairs(args.data)
    model, processor, settings = load_model(settings)
    out = Path(args.out) if args.out else Path("runs") / f"dyvte-{Path(args.model).name if args.model else 'bundled'}"
    wanted = args.num_samples if pairs is None else min(args.num_samples, len(pairs))
    found = calibrate_dyvte(
        model,
        processed(processor, scene_pairs(wanted, args.seed) if pairs is None else pairs),
        num_samples=wanted,
        epsilon=args.epsilon,
        slack=args.slack,
        routers=args.routers,
        router_dim=args.router_dim,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        out=out,
        overwrite=args.overwrite,
        name=model_name(settings),
    )
    summary = _summary(found, out)
    CalibrationDir(out).write_summary(summary)
    if not args.json_only:
        print(_table(found))
    print(json.dumps(summary, separators=(",", ":")), flush=True)
    return summary


def _summary(found: Calibration, out: Path) -> dict[str, Any]:
    profile = found.profile
    return {
        "command": "calibrate dyvte",
        "model": profile.model,
        "layers": profile.layers,
        "exit": profile.exit,
        "epsilon": profile.epsilon,
        "samples": profile.samples,
        "safe_rate": {str(one.layer): one.safe_rate for one in profile.per_layer},
        "routed_safe_rate": None if found.routed is None else found.routed[0],
        "routed_mean_layer": None if found.routed is None else found.routed[1],
        "out": str(out),
    }


def _table(found: Calibration) -> str:
    """What happened behind each layer."""
    profile = found.profile
    scores = {score.layer: score for score in profile.routers}
    head = "layer  safe    same tokens  loss"
    lines = [head + ("     router: exits  precision  recall" if scores else "")]
    for one in profile.per_layer:
        line = f"{one.layer:>5}  {one.safe_rate:6.1%}  {one.agreement:11.1%}  {one.loss:<7.4f}"
        if one.layer in scores:
            score = scores[one.layer]
            line += f"  {score.exits:13.1%}  {_percent(score.precision)}  {_percent(score.recall)}"
        lines.append(line)
    last = profile.exit == profile.layers - 1
    chosen = (
        "no layer is safe enough: visual tokens stay" if last else f"visual tokens leave after layer {profile.exit}"
    )
    lines.append(
        f"{chosen} ({profile.samples} samples, at most {profile.epsilon:.0%} of them changed; full model: loss "
        f"{profile.loss:.4f})"
    )
    if found.routed is not None:
        lines.append(f"routers together: {found.routed[0]:.1%} safe, exit after layer {found.routed[1]:.1f} on average")
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "      none" if share is None else f"{share:10.1%}"
