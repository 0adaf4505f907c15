"""``llm-accel heads``: finds the retrieval heads of a model and writes their profile."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from llm_accel.calibrate.heads.induction import induction_scores
from llm_accel.calibrate.heads.plot import write as write_plot
from llm_accel.calibrate.heads.profile import HeadProfile, make_profile
from llm_accel.calibrate.heads.runs import Grid
from llm_accel.calibrate.heads.table import render
from llm_accel.common.arguments import add_model, add_place, add_shown, at_least, one_of
from llm_accel.common.environment import versions
from llm_accel.common.progress import bar
from llm_accel.errors import ConfigError
from llm_accel.eval.plots import require_matplotlib
from llm_accel.eval.tasks.needle import settings as s
from llm_accel.eval.tasks.needle.command import make_prompts, prompts_digest
from llm_accel.eval.tasks.needle.loading import load_model, model_name
from llm_accel.eval.tasks.needle.records import NeedleDir
from llm_accel.eval.tasks.needle.settings import Settings
from llm_accel.patches.heads import model_heads
from llm_accel.patches.identity import weight_hash

DETECTORS = ("induction", "copy_paste")
CIRCUIT_PROMPTS = 8
APART = 2**20  # added to the seed of the prompts, so that `llm-accel needle` with the same seed judges on others
_SMALL = 128  # query heads up to which the circuit is looked for unless told otherwise


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command; values are checked in :func:`run`."""
    add_model(parser, "needle")
    parser.add_argument(
        "--detector",
        default=DETECTORS[0],
        metavar="|".join(DETECTORS),
        help="induction: random tokens, no data, seconds; copy_paste: needle prompts (default: %(default)s)",
    )
    parser.add_argument("--out", metavar="DIR", help="default: runs/heads-<model>-<detector>")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--samples", type=int, default=2, metavar="N", help="inputs, or prompts per length and depth (default: 2)"
    )
    add_place(parser, attention=False)
    add_shown(parser, "heads.png")
    free = parser.add_argument_group("induction")
    free.add_argument(
        "--tokens", type=int, metavar="N", help="random tokens, repeated four times (default: 512; paper: 2500)"
    )
    runs = parser.add_argument_group("copy_paste")
    runs.add_argument("--lengths", metavar="LIST", help="prompt lengths in tokens (default: 512,1k,2k)")
    runs.add_argument("--depths", metavar="N|LIST", help="as in llm-accel needle (default: 5)")
    runs.add_argument("--needles", type=int, metavar="N", help="one asked, the others distract (default: 4)")
    runs.add_argument("--haystack", metavar="FILE|DIR|dataset:NAME", help="default: built-in sentences")
    runs.add_argument("--compat", action="store_true", help="count repeated copies, as the published scores do")
    runs.add_argument(
        "--circuit",
        action=argparse.BooleanOptionalAction,
        default=None,
        help=f"take out each head alone to see what answering rests on (default: on up to {_SMALL} query heads)",
    )
    runs.add_argument("--overwrite", action="store_true", help="start anew in --out instead of going on")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Detects, writes heads.json and heads.png, prints the table and one JSON line, and returns that.

    Raises:
        LlmAccelError: anything wrong with the arguments, before anything is run or written.
    """
    _check(args)
    if args.plot:
        require_matplotlib()
    settings = Settings(
        model=args.model,
        methods=("dense",),
        lengths=s.parse_lengths(args.lengths or "512,1k,2k"),
        depths=s.parse_depths(args.depths or "5"),
        samples=args.samples,
        task="single" if args.needles == 1 else "multikey",
        needles=4 if args.needles is None else args.needles,
        haystack=args.haystack or "grammar",
        dtype=args.dtype,
        device=args.device,
        seed=args.seed + APART,
    )
    model, tokenizer, settings = load_model(settings)
    name = Path(args.model).name if args.model else "bundled"
    out = Path(args.out) if args.out else Path("runs") / f"heads-{name}-{args.detector}"
    detect = _induction if args.detector == "induction" else _copy_paste
    profile = detect(args, model, tokenizer, settings, out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        profile.save(out / "heads.json")
    except OSError as error:
        raise ConfigError(f"--out {str(out)!r} cannot be used: {error.strerror or error}.") from error
    if args.plot:
        write_plot(out / "heads.png", profile)
    summary = _summary(profile, out)
    if not args.json_only:
        print(render(profile))
    print(json.dumps(summary, separators=(",", ":")), flush=True)
    return summary


def _check(args: argparse.Namespace) -> None:
    one_of(DETECTORS, detector=args.detector)
    at_least(1, samples=args.samples)
    owner = {"tokens": "induction"} | dict.fromkeys(
        ("lengths", "depths", "needles", "haystack", "compat", "circuit", "overwrite"), "copy_paste"
    )
    for option, detector in owner.items():
        if getattr(args, option) not in (None, False) and detector != args.detector:
            raise ConfigError(f"--{option} belongs to --detector {detector}, not to --detector {args.detector}.")


def _induction(args: argparse.Namespace, model: Any, tokenizer: Any, settings: Settings, out: Path) -> HeadProfile:
    tokens = 512 if args.tokens is None else args.tokens
    with bar(args.samples * model_heads(model).layers, "layer") as counter:
        scores, echo = induction_scores(model, tokenizer, tokens, args.samples, args.seed, tick=counter.update)
    return make_profile(
        model,
        model_name(settings.model),
        "induction",
        scores,
        echo=echo,
        n_instances=args.samples,
        seed=args.seed,
        versions=_versions(),
        settings={"tokens": tokens},
    )


def _copy_paste(args: argparse.Namespace, model: Any, tokenizer: Any, settings: Settings, out: Path) -> HeadProfile:
    maker, settings = make_prompts(settings, tokenizer)
    settings = replace(settings, methods=("copy_paste",))
    tied = settings.to_dict() | {"prompt_hash": prompts_digest(maker), "weights_hash": weight_hash(model)}
    run_dir = NeedleDir(out)
    done = run_dir.open(tied, {"command": "heads", "versions": _versions(), "argv": sys.argv[1:]}, args.overwrite)
    grid = Grid(model, tokenizer, maker, settings)
    records = grid.run(run_dir, done)
    scores, answered = grid.scores(records, args.compat)
    heads = model_heads(model)
    look = heads.layers * heads.query_heads <= _SMALL if args.circuit is None else args.circuit
    return make_profile(
        model,
        model_name(settings.model),
        "copy_paste",
        scores,
        circuit=grid.circuit(records, scores, CIRCUIT_PROMPTS) if look else None,
        n_instances=answered,
        seed=args.seed,
        versions=_versions(),
        settings={
            "lengths": list(settings.lengths),
            "depths": list(settings.depths),
            "samples": settings.samples,
            "needles": settings.needles,
            "haystack": settings.haystack,
            "prompts": len(records),
            "compat": args.compat,
        },
    )


def _versions() -> dict[str, str | None]:
    return {name: version for name, version in versions().items() if name != "git_commit"}


def _summary(profile: HeadProfile, out: Path) -> dict[str, Any]:
    detected = profile.detected()
    every = range(profile.layers)
    return {
        "command": "heads",
        "model": profile.model,
        "detector": profile.method,
        "layers": profile.layers,
        "query_heads": profile.shape[1],
        "kv_heads": profile.shape[2],
        "n_instances": profile.n_instances,
        "retrieval_heads": [list(head) for head in detected],
        "circuit": None if profile.circuit is None else [list(head) for head in profile.circuit],
        "full_kv_heads": [list(head) for head in sorted(profile.full_heads(profile.full_share(every), every))],
        "out": str(out),
    }
