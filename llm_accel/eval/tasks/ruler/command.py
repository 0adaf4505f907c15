"""``llm-accel ruler``: arguments, and the run from arguments to summary."""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from llm_accel.common.arguments import (
    add_haystack,
    add_methods,
    add_model,
    add_place,
    add_prompt_form,
    add_run_output,
    canonical_methods,
    parse_shard,
)
from llm_accel.common.launch import check_alone
from llm_accel.eval.engine import Engine
from llm_accel.eval.evaluation import Evaluation
from llm_accel.eval.heatmap import PALETTES, Panel, draw
from llm_accel.eval.plots import save
from llm_accel.eval.prompts.encoding import Encoder, make_frame
from llm_accel.eval.prompts.haystack import load_haystack
from llm_accel.eval.records import RunDir
from llm_accel.eval.tasks.needle.loading import load_model, model_name
from llm_accel.eval.tasks.needle.settings import parse_lengths
from llm_accel.eval.tasks.ruler import settings as s
from llm_accel.eval.tasks.ruler.needles import WORDINGS
from llm_accel.eval.tasks.ruler.prompts import Place, PromptMaker
from llm_accel.eval.tasks.ruler.runner import RulerDir, places, run_places
from llm_accel.eval.tasks.ruler.samples import write_samples
from llm_accel.eval.tasks.ruler.settings import Settings
from llm_accel.eval.tasks.ruler.summary import summarize
from llm_accel.eval.tasks.ruler.table import render, title
from llm_accel.eval.tasks.ruler.tasks import QA, TASKS
from llm_accel.registry import parse_all

_RESOLVED = ("chat_template", "dtype", "device")  # settings that model and tokenizer may fill in
_HAYSTACK_TOKENS = 2**18  # what is read of a long haystack at least; prompts begin anywhere in it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command; values are checked later, in :class:`Settings`."""
    add_model(parser, "needle")
    add_methods(parser, f"dense is the plain model (default: {' '.join(s.DEFAULT_METHODS)})")
    data = parser.add_argument_group("prompts")
    data.add_argument(
        "--lengths",
        default=s.DEFAULT_LENGTHS,
        metavar="LIST",
        help="tokens of prompt and answer together, met exactly; 1k = 1024 (default: %(default)s)",
    )
    data.add_argument(
        "--tasks",
        metavar="LIST|all",
        help=f"of {', '.join(TASKS)} (default: all that need no data; bundled model: those it was trained for)",
    )
    data.add_argument(
        "--samples",
        type=int,
        default=s.DEFAULT_SAMPLES,
        metavar="N",
        help="prompts per task and length; RULER has 500 (default: %(default)s)",
    )
    data.add_argument("--shard", default="1/1", metavar="I/N", help="run the I-th of N parts; they may share --out")
    add_haystack(data, "prose to hide needles in; RULER takes Paul Graham's essays, which are not shipped")
    data.add_argument("--words", metavar="FILE", help="words for the lists of cwe (default: built-in ones)")
    for task, name in zip(QA, ("SQuAD", "HotpotQA"), strict=True):
        data.add_argument(
            "--" + task.replace("_", "-"),
            metavar="FILE|NAME",
            help=f"questions and documents of {task}, {name} in RULER: a .json or .jsonl file or a dataset",
        )
    data.add_argument(
        "--wording",
        metavar="|".join(WORDINGS),
        help="of needle tasks: RULER's, or what the bundled model was trained on (default: as the model needs)",
    )
    add_prompt_form(data)
    data.add_argument("--seed", type=int, default=42, metavar="N", help="seed of the prompts (default: %(default)s)")
    run_group = parser.add_argument_group("run")
    run_group.add_argument(
        "--batch-size", type=int, default=1, metavar="N", help="prompts per call (default: %(default)s)"
    )
    add_place(run_group)
    out = parser.add_argument_group("output")
    add_run_output(out, "ruler", "tasks.png")
    out.add_argument(
        "--write-samples", metavar="FILE", help="write the prompts as JSON lines for other harnesses, and run nothing"
    )
    out.add_argument("--palette", default="classic", choices=sorted(PALETTES), help="safe: for colour-blind readers")


def settings_from(args: argparse.Namespace) -> Settings:
    """Checked settings; raises :class:`ConfigError` or another :class:`llm_accel.LlmAccelError`."""
    bundled = args.model is None
    return Settings(
        model=args.model,
        methods=canonical_methods(args.methods or s.DEFAULT_METHODS),
        lengths=parse_lengths(args.lengths),
        tasks=s.parse_tasks(args.tasks, bundled, tuple(task for task in QA if getattr(args, task))),
        samples=args.samples,
        wording=args.wording or ("bundled" if bundled else "ruler"),
        haystack=args.haystack,
        words=args.words,
        qa_1=args.qa_1,
        qa_2=args.qa_2,
        query_agnostic=args.query_agnostic,
        chat_template=args.chat_template,
        batch_size=args.batch_size,
        dtype=args.dtype,
        device=args.device,
        attn=args.attn,
        seed=args.seed,
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the tasks, prints the tables and the summary as the last line of stdout, and returns the summary. Of
    several processes each does its part, and the first one prints.

    Raises:
        LlmAccelError: anything wrong with the arguments, before anything is run or written.
    """
    settings = settings_from(args)
    if args.write_samples:
        return _write(args, settings)
    evaluation = Evaluation.begin("ruler", RulerDir, args, settings, _RESOLVED)
    model, tokenizer, settings = load_model(settings)
    maker, settings = make_prompts(settings, tokenizer)
    configs = {method: parse_all(method) for method in settings.methods}
    budgets = sorted({TASKS[task].new_tokens for task in settings.tasks})
    engines = {n: Engine(model, tokenizer, n, settings.query_agnostic) for n in budgets}
    for parts in filter(None, configs.values()):
        engines[budgets[0]].try_method(parts)
    trained = evaluation.check_length(model, max(settings.lengths))
    run_dir, done = evaluation.open(
        settings, prompts_digest(maker), model, haystack_tokens=maker.prose.tokens, haystack_hash=maker.prose.digest()
    )
    wanted, part, launch = places(settings, evaluation.shard), evaluation.shard, evaluation.launch
    return evaluation.conclude(
        lambda: run_places(settings, engines, maker, configs, run_dir, done, wanted, part, launch.say, launch.first),
        lambda: finish(settings, run_dir, trained, plot=args.plot, palette=args.palette),
        lambda summary: render(settings, summary, model_name(settings.model)),
    )


def _write(args: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """The prompts of the run into a file, for other harnesses."""
    check_alone("ruler --write-samples", "it writes one file")
    _, tokenizer, settings = load_model(settings)
    maker, settings = make_prompts(settings, tokenizer)
    summary = write_samples(Path(args.write_samples), maker, places(settings, parse_shard(args.shard)))
    print(json.dumps(summary, separators=(",", ":")), flush=True)
    return summary


def make_prompts(settings: Settings, tokenizer: Any) -> tuple[PromptMaker, Settings]:
    """The prompt maker, and the settings with what the tokenizer decides filled in.

    Raises:
        ConfigError: no room for a task at the shortest length, an unreadable file, no chat template.
    """
    encoder = Encoder(tokenizer)
    frame = make_frame(encoder, settings.chat_template)
    prose = load_haystack(settings.haystack, encoder, tokens=max(_HAYSTACK_TOKENS, 4 * max(settings.lengths)))
    settings = replace(settings, chat_template=frame.chat)
    maker = PromptMaker(settings, encoder, frame, prose)
    for task in settings.tasks:  # a question's own documents may be longer than the others'
        for sample in range(settings.samples if task in QA else 1):
            maker.make(Place(min(settings.lengths), task, sample))
    return maker, settings


def prompts_digest(maker: PromptMaker) -> str:
    """Hash over the first prompt of every task and length, 16 hex digits."""
    digest = hashlib.sha256()
    for length in maker.settings.lengths:
        for task in maker.settings.tasks:
            digest.update(maker.make(Place(length, task, 0)).digest().encode())
    return digest.hexdigest()[:16]


def finish(settings: Settings, run_dir: RunDir, trained: int | None, plot: bool, palette: str) -> dict[str, Any]:
    """Writes summary.json and tasks.png from all records in the directory."""
    name = model_name(settings.model)
    summary = summarize(settings, run_dir.records(), command="ruler", model=name, out=str(run_dir.path))
    run_dir.write_summary(summary)
    if plot:
        found = {method: entry["lengths"] for method, entry in summary["methods"].items()}
        panels = [
            Panel(
                method,
                [
                    [found[method].get(str(n), {"tasks": {}})["tasks"].get(t) for n in settings.lengths]
                    for t in settings.tasks
                ],
                summary["methods"][method]["score"],
            )
            for method in settings.methods
        ]
        figure = draw(
            panels,
            settings.lengths,
            settings.tasks,
            title(settings, name),
            f"{settings.samples} prompts per cell; beside each name: the mean",
            trained,
            palette,
            row_label="",
            score="RULER's score",
        )
        save(run_dir.path / "tasks.png", figure)
    return summary
