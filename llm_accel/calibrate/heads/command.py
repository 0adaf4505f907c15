"""``llm-accel heads``: finds the retrieval heads of a model and writes their profile."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_accel.calibrate.heads.induction import induction_scores
from llm_accel.calibrate.heads.plot import draw
from llm_accel.calibrate.heads.profile import make_profile
from llm_accel.calibrate.heads.runs import NAME, CopyTask
from llm_accel.calibrate.heads.table import render
from llm_accel.common.arguments import ModelOptions, OutputOptions
from llm_accel.common.environment import packages
from llm_accel.common.loading import load_text_model
from llm_accel.common.options import flag, option
from llm_accel.errors import ConfigError
from llm_accel.eval.lengths import parse_lengths
from llm_accel.eval.plots import require_matplotlib, save
from llm_accel.eval.records import RunDir, reported_errors
from llm_accel.eval.runner import print_summary, run_items
from llm_accel.eval.tasks.needle.settings import NeedleSettings, parse_depths
from llm_accel.eval.tasks.needle.task import NeedleMaker
from llm_accel.methods.kv.head_profile import HeadProfile
from llm_accel.patches.heads import model_heads
from llm_accel.patches.identity import weight_hash

DETECTORS = ("induction", "copy_paste")
CIRCUIT_PROMPTS = 8
APART = 2**20  # added to the seed of the prompts, so that `llm-accel needle` with the same seed judges on others
_SMALL = 128  # query heads up to which the circuit is looked for unless told otherwise


@dataclass(frozen=True, kw_only=True)
class HeadsOptions(OutputOptions, ModelOptions):
    """Options of the command; those of the other detector are refused."""

    detector: str = option(
        "induction: random tokens, no data, takes seconds; copy_paste: needle prompts", DETECTORS[0], choices=DETECTORS
    )
    seed: int = option("seed of tokens or prompts", 0)
    samples: int = option("inputs, or prompts per length and depth", 2, least=1)
    attn: str | None = option("", None, flag="")
    out: str | None = option("default: runs/heads-<model>-<detector>", None, metavar="DIR", group="output")
    tokens: int | None = option(
        "random tokens, repeated four times (default: 512; paper: 2500)", None, group="induction"
    )
    lengths: tuple[int, ...] | None = option(
        "prompt lengths in tokens (default: 512,1k,2k)", None, metavar="LIST", parse=parse_lengths, group="copy_paste"
    )
    depths: tuple[float, ...] | None = option(
        "as in llm-accel needle (default: 5)", None, metavar="N|LIST", parse=parse_depths, group="copy_paste"
    )
    needles: int | None = option("one is asked for, the others are distractors (default: 4)", None, group="copy_paste")
    haystack: str | None = option(
        "default: built-in sentences", None, metavar="FILE|DIR|dataset:NAME", group="copy_paste"
    )
    compat: bool = option("count repeated copies, as the published scores do", False, group="copy_paste")
    circuit: bool | None = option(
        f"ablate each head alone to see which ones answers depend on (default: on up to {_SMALL} query heads)",
        None,
        group="copy_paste",
    )
    overwrite: bool = option("start over in --out instead of resuming", False, group="copy_paste")

    def validate(self) -> None:
        others = ("lengths", "depths", "needles", "haystack", "compat", "circuit", "overwrite")
        for name, detector in ({"tokens": "induction"} | dict.fromkeys(others, "copy_paste")).items():
            if getattr(self, name) not in (None, False) and detector != self.detector:
                raise ConfigError(f"{flag(name)} belongs to --detector {detector}, not to --detector {self.detector}.")

    def prompts(self) -> NeedleSettings:
        """The needle prompts of the copy-paste detector."""
        return NeedleSettings(
            model=self.model,
            methods=(NAME,),
            lengths=self.lengths or parse_lengths("512,1k,2k"),
            depths=self.depths or parse_depths("5"),
            samples=self.samples,
            task="single" if self.needles == 1 else "multikey",
            needles=4 if self.needles is None else self.needles,
            haystack=self.haystack or "grammar",
            dtype=self.dtype,
            device=self.device,
            seed=self.seed + APART,
        )


add_arguments = HeadsOptions.add_arguments


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Detects, writes heads.json and heads.png, prints the table and one JSON line, and returns that. Raises
    :class:`LlmAccelError`: anything wrong with the arguments, before anything is run or written."""
    options = HeadsOptions.from_arguments(args)
    if options.plot:
        require_matplotlib()
    model, tokenizer, settings = load_text_model(options.prompts())
    name = Path(options.model).name if options.model else "bundled"
    out = Path(options.out) if options.out else Path("runs") / f"heads-{name}-{options.detector}"
    detect = _induction if options.detector == "induction" else _copy_paste
    found = detect(options, model, tokenizer, settings, out)
    profile = make_profile(model, settings.model_name, options.detector, seed=options.seed, **found)
    with reported_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        profile.save(out / "heads.json")
    if options.plot:
        save(out / "heads.png", draw(profile))
    summary = _summary(profile, out)
    print_summary(summary, None if options.json_only else render(profile))
    return summary


def _induction(
    options: HeadsOptions, model: Any, tokenizer: Any, settings: NeedleSettings, out: Path
) -> dict[str, Any]:
    tokens = 512 if options.tokens is None else options.tokens
    scores, echo = induction_scores(model, tokenizer, tokens, options.samples, options.seed)
    return {"scores": scores, "echo": echo, "n_instances": options.samples, "settings": {"tokens": tokens}}


def _copy_paste(
    options: HeadsOptions, model: Any, tokenizer: Any, settings: NeedleSettings, out: Path
) -> dict[str, Any]:
    task = CopyTask(model, tokenizer, NeedleMaker.load(settings, tokenizer))
    settings = task.settings
    tied = settings.to_dict() | {"prompt_hash": task.digest(), "weights_hash": weight_hash(model)}
    run_dir = RunDir(out, task.fields)
    done = run_dir.open(tied, {"command": "heads", "versions": packages(), "argv": sys.argv[1:]}, options.overwrite)
    run_items(task, run_dir, done)
    records = run_dir.records()
    scores, answered = task.head_scores(records, options.compat)
    heads = model_heads(model)
    wanted = heads.layers * heads.query_heads <= _SMALL if options.circuit is None else options.circuit
    told = {name: settings.to_dict()[name] for name in ("lengths", "depths", "samples", "needles", "haystack")}
    return {
        "scores": scores,
        "circuit": task.circuit(records, scores, CIRCUIT_PROMPTS) if wanted else None,
        "n_instances": answered,
        "settings": told | {"prompts": len(records), "compat": options.compat},
    }


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
