"""``llm-accel vision``: arguments, and the run from arguments to summary."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from llm_accel.common.arguments import add_model, add_place, add_run_output, canonical_methods
from llm_accel.errors import ConfigError
from llm_accel.eval.evaluation import Evaluation
from llm_accel.eval.plots import save
from llm_accel.eval.records import RunDir
from llm_accel.eval.tasks.vision import curves, pictures
from llm_accel.eval.tasks.vision import settings as s
from llm_accel.eval.tasks.vision.coco import objects_in
from llm_accel.eval.tasks.vision.controls import CONTROLS, InputControl
from llm_accel.eval.tasks.vision.engine import Engine
from llm_accel.eval.tasks.vision.examples import SceneSource, Source
from llm_accel.eval.tasks.vision.loading import load_model, model_name
from llm_accel.eval.tasks.vision.questions import TASKS, Task
from llm_accel.eval.tasks.vision.reader import Reader
from llm_accel.eval.tasks.vision.runner import PICTURED, VisionDir, run_samples
from llm_accel.eval.tasks.vision.scenes import SPLITS, SplitName
from llm_accel.eval.tasks.vision.scoring import pairs
from llm_accel.eval.tasks.vision.settings import Settings
from llm_accel.eval.tasks.vision.sources import load_rows
from llm_accel.eval.tasks.vision.summary import summarize
from llm_accel.eval.tasks.vision.table import render, title

_RESOLVED = ("max_new_tokens", "dtype", "device")  # settings that model and data may fill in


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command; values are checked later, in :class:`Settings`."""
    add_model(parser, "vision")
    parser.add_argument(
        "--gaps",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="of the bundled model, the weights trained on images with gaps, or those before that (default: on)",
    )
    parser.add_argument(
        "--method",
        action="append",
        metavar="NAME[:OPTION=VALUE,...][+NAME...]",
        dest="methods",
        help="repeatable; methods joined by + run together. dense is the plain model, blank a grey image, oracle keeps "
        f"the patches that things cover (default: {' '.join(s.DEFAULT_METHODS)})",
    )
    parser.add_argument(
        "--keep",
        metavar="LIST",
        help="shares of the visual tokens, such as 0.11,0.22,0.33: each --method that does not say how many it keeps "
        "runs at each of them",
    )
    parser.add_argument(
        "--blind",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="a row for the prompts without their image: what can be guessed (default: on)",
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        default=s.SCENES,
        metavar="scenes|pope:SOURCE|chair:SOURCE",
        help="drawn scenes, or POPE or CHAIR on rows of a .jsonl file or a dataset NAME[,split=test,config=NAME] "
        "(default: %(default)s)",
    )
    data.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help=f"images (default: {s.DEFAULT_SAMPLES} scenes, or all of a file or dataset)",
    )
    data.add_argument(
        "--split", metavar="|".join(SPLITS), help="scenes with 1 to 4 things, or 8 to 12 (default: standard)"
    )
    data.add_argument("--tasks", metavar="LIST", help=f"asked about scenes (default: {','.join(TASKS)})")
    data.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the scenes (default: %(default)s)")
    data.add_argument("--shard", default="1/1", metavar="I/N", help="run the I-th of N parts; they may share --out")
    run_group = parser.add_argument_group("run")
    run_group.add_argument(
        "--prompt",
        metavar="TEXT",
        help=f"form of a prompt, with {s.PLACEHOLDER} and {s.QUESTION} (default: the processor's chat template, "
        f"else '{s.PLACEHOLDER} {s.QUESTION}')",
    )
    run_group.add_argument(
        "--batch-size",
        type=int,
        default=16,
        metavar="N",
        help="questions per call, of one image (default: %(default)s)",
    )
    run_group.add_argument("--max-new-tokens", type=int, metavar="N", help="default: what the longest answer needs")
    add_place(run_group)
    out = parser.add_argument_group("output")
    add_run_output(out, "vision", "curves.png, and for scenes which patches stay")


def settings_from(args: argparse.Namespace) -> Settings:
    """Checked settings; raises :class:`ConfigError` or another :class:`llm_accel.LlmAccelError`."""
    drawn = args.data == s.SCENES
    for option in ("split", "tasks"):
        if not drawn and getattr(args, option) is not None:
            raise ConfigError(f"--{option} belongs to drawn scenes, not to --data {args.data!r}; leave it out.")
    methods: Sequence[str] = args.methods or s.DEFAULT_METHODS
    if args.keep is not None:
        methods = s.sweep(methods, s.parse_keep(args.keep))
    if args.blind and "blind" not in methods:
        methods = (*methods, "blind")
    tasks = TASKS if args.tasks is None else tuple(filter(None, (part.strip() for part in args.tasks.split(","))))
    return Settings(
        model=args.model,
        gaps=args.gaps,
        methods=canonical_methods(methods, CONTROLS),
        data=args.data,
        split=args.split or "standard",
        tasks=tuple(dict.fromkeys(tasks)),
        samples=args.samples if args.samples is not None or not drawn else s.DEFAULT_SAMPLES,
        prompt=args.prompt,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        dtype=args.dtype,
        device=args.device,
        attn=args.attn,
        seed=args.seed,
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs everything, prints the tables and the summary as the last line of stdout, and returns the summary. Of
    several processes each does its part, and the first one prints.

    Raises:
        LlmAccelError: anything wrong with the arguments, before anything is run or written.
    """
    settings = settings_from(args)
    evaluation = Evaluation.begin("vision", VisionDir, args, settings, _RESOLVED)
    source = make_source(settings)
    settings = replace(settings, max_new_tokens=settings.max_new_tokens or source.max_new_tokens)
    model, processor, settings = load_model(settings)
    assert settings.max_new_tokens is not None
    engine = Engine(model, Reader(processor, settings.prompt), settings.max_new_tokens, settings.seed)
    configs = {method: s.parse_method(method) for method in settings.methods}
    for parts in configs.values():
        engine.try_method(parts)
    count, digest = source.digest()
    run_dir, done = evaluation.open(settings, digest, model, prompt=engine.reader.text("{question}"))
    mentions = pairs if settings.data == s.SCENES else objects_in
    size, part, launch = settings.batch_size, evaluation.shard, evaluation.launch
    return evaluation.conclude(
        lambda: run_samples(engine, source, configs, run_dir, done, mentions, size, part, launch.say, launch.first),
        lambda: finish(settings, source, run_dir, count * len(configs), plot=args.plot),
        lambda summary: render(settings, summary, model_name(settings)),
    )


def make_source(settings: Settings) -> Source:
    """Where images and questions come from; raises :class:`ConfigError` for files that cannot be read."""
    if settings.data != s.SCENES:
        return load_rows(settings.data, settings.samples)
    assert settings.samples is not None
    tasks = cast(tuple[Task, ...], settings.tasks)
    return SceneSource(settings.samples, settings.seed, cast(SplitName, settings.split), tasks)


def finish(settings: Settings, source: Source, run_dir: RunDir, wanted: int, plot: bool) -> dict[str, Any]:
    """Writes summary.json and the pictures from all records in the directory."""
    records = sorted(run_dir.records(), key=lambda record: int(record["sample"]))  # parts of a run end in any order
    name = model_name(settings)
    summary = summarize(settings, records, wanted, command="vision", model=name, out=str(run_dir.path))
    run_dir.write_summary(summary)
    if plot and records:
        save(run_dir.path / "curves.png", curves.draw(summary, title(settings, name)))
        for method in settings.methods:
            if any(not isinstance(config, InputControl) for config in s.parse_method(method)):
                _picture(source, run_dir, method)
    return summary


def _picture(source: Source, run_dir: RunDir, method: str) -> None:
    """The first questions about the first images, where it is known which patches the visual tokens are."""
    kept = {VisionDir.key(r): r for r in run_dir.records() if r["method"] == method and "kept" in r}
    shown = []
    for sample in range(min(PICTURED, len(source)) if kept else 0):
        for example in source.examples(sample):
            record = kept.get((method, example.sample, example.task, example.number))
            if record and example.patches is not None and example.patches.size == len(record["kept"]):
                shown.append((example, record))
                break
    if shown:
        save(run_dir.path / pictures.file_name(method), pictures.draw(method, shown))
