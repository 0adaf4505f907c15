"""``llm-accel needle``: arguments, and the run from arguments to summary."""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import replace
from typing import Any

from llm_accel.common.arguments import (
    add_haystack,
    add_methods,
    add_model,
    add_place,
    add_prompt_form,
    add_run_output,
    canonical_methods,
)
from llm_accel.eval.engine import Engine
from llm_accel.eval.evaluation import Evaluation
from llm_accel.eval.grid import places
from llm_accel.eval.heatmap import PALETTES, Panel, draw
from llm_accel.eval.plots import save
from llm_accel.eval.prompts.encoding import Encoder, make_frame
from llm_accel.eval.prompts.grammar import KEY_KINDS
from llm_accel.eval.prompts.haystack import load_haystack
from llm_accel.eval.records import Record, RunDir
from llm_accel.eval.tasks.needle import settings as s
from llm_accel.eval.tasks.needle.loading import load_model, model_name
from llm_accel.eval.tasks.needle.prompts import PromptMaker
from llm_accel.eval.tasks.needle.records import NeedleDir
from llm_accel.eval.tasks.needle.runner import run_grid
from llm_accel.eval.tasks.needle.settings import Settings
from llm_accel.eval.tasks.needle.summary import cell_means, summarize
from llm_accel.eval.tasks.needle.table import render, title
from llm_accel.eval.tasks.needle.tasks import check_task
from llm_accel.registry import parse_all

_HAYSTACK_TOKENS = 2**18  # what is read of a long haystack at least; prompts begin anywhere in it
_RESOLVED = ("chat_template", "max_new_tokens", "dtype", "device")  # settings that model and tokenizer may fill in


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command; values are checked later, in :class:`Settings`."""
    add_model(parser, "needle")
    add_methods(parser, f"dense is the plain model (default: {' '.join(s.DEFAULT_METHODS)})")
    grid = parser.add_argument_group("grid")
    grid.add_argument(
        "--lengths",
        default=s.DEFAULT_LENGTHS,
        metavar="LIST",
        help="prompt lengths in tokens, template, question and answer prefix included; 1k = 1024 "
        "(default: %(default)s)",
    )
    grid.add_argument(
        "--depths",
        default=s.DEFAULT_DEPTHS,
        metavar="N|LIST",
        help="a number of depths from 0 to 100 %%, or a list of percentages (default: %(default)s)",
    )
    grid.add_argument("--samples", type=int, default=1, metavar="N", help="prompts per cell (default: %(default)s)")
    grid.add_argument(
        "--shard", default="1/1", metavar="I/N", help="run the I-th of N parts of the grid; the parts may share --out"
    )
    task = parser.add_argument_group("task")
    task.add_argument(
        "--task", default="multikey", metavar="|".join(s.TASKS), help="RULER's variants (default: %(default)s)"
    )
    task.add_argument(
        "--needles",
        type=int,
        metavar="N",
        help="needles of the task: keys, values of the key, or keys asked for (default: 4; single: 1)",
    )
    task.add_argument(
        "--distractors",
        type=int,
        default=0,
        metavar="N",
        help="needles on top, with keys that nobody asks for (default: %(default)s)",
    )
    task.add_argument("--key-kind", default="word", metavar="|".join(KEY_KINDS), help="default: %(default)s")
    task.add_argument("--value-kind", default="number", metavar="|".join(KEY_KINDS), help="default: %(default)s")
    add_haystack(task, "text to hide needles in")
    add_prompt_form(task)
    task.add_argument(
        "--answer-prefix",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="begin the answer for the model, as RULER does (default: on)",
    )
    run_group = parser.add_argument_group("run")
    run_group.add_argument(
        "--batch-size", type=int, default=1, metavar="N", help="prompts per call (default: %(default)s)"
    )
    run_group.add_argument("--max-new-tokens", type=int, metavar="N", help="default: what the longest answer needs")
    add_place(run_group, "the checkpoint's; bundled model on a CPU: float32")
    run_group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the prompts (default: %(default)s)"
    )
    out = parser.add_argument_group("output")
    add_run_output(out, "needle", "heatmap.png")
    out.add_argument("--palette", default="classic", choices=sorted(PALETTES), help="safe: for colour-blind readers")


def settings_from(args: argparse.Namespace) -> Settings:
    """Checked settings; raises :class:`ConfigError` or another :class:`llm_accel.LlmAccelError`."""
    needles = args.needles if args.needles is not None else 1 if args.task == "single" else 4
    settings = Settings(
        model=args.model,
        methods=canonical_methods(args.methods or s.DEFAULT_METHODS),
        lengths=s.parse_lengths(args.lengths),
        depths=s.parse_depths(args.depths),
        samples=args.samples,
        task=args.task,
        needles=needles,
        distractors=args.distractors,
        key_kind=args.key_kind,
        value_kind=args.value_kind,
        haystack=args.haystack,
        query_agnostic=args.query_agnostic,
        chat_template=args.chat_template,
        answer_prefix=args.answer_prefix,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        dtype=args.dtype,
        device=args.device,
        attn=args.attn,
        seed=args.seed,
    )
    check_task(settings)
    return settings


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the grid, prints the table and the summary as the last line of stdout, and returns the summary. Of several
    processes each does its part, and the first one prints.

    Raises:
        LlmAccelError: anything wrong with the arguments, before anything is run or written.
    """
    settings = settings_from(args)
    evaluation = Evaluation.begin("needle", NeedleDir, args, settings, _RESOLVED)
    model, tokenizer, settings = load_model(settings)
    maker, settings = make_prompts(settings, tokenizer)
    engine = Engine(model, tokenizer, maker.max_new_tokens, settings.query_agnostic)
    configs = {method: parse_all(method) for method in settings.methods}
    for parts in filter(None, configs.values()):
        engine.try_method(parts)
    trained = evaluation.check_length(model, max(settings.lengths) + maker.max_new_tokens)
    run_dir, done = evaluation.open(
        settings,
        prompts_digest(maker),
        model,
        haystack_tokens=maker.haystack.tokens,
        haystack_hash=maker.haystack.digest(),
    )
    wanted, part, launch = places(settings, evaluation.shard), evaluation.shard, evaluation.launch
    return evaluation.conclude(
        lambda: run_grid(settings, engine, maker, configs, run_dir, done, wanted, part, launch.say, launch.first),
        lambda: finish(settings, run_dir, trained, plot=args.plot, palette=args.palette),
        lambda summary: render(settings, summary, model_name(settings.model)),
    )


def make_prompts(settings: Settings, tokenizer: Any) -> tuple[PromptMaker, Settings]:
    """The prompt maker, and the settings with what the tokenizer decides filled in.

    Raises:
        ConfigError: no room for the needles at the shortest length, an unreadable haystack, no chat template.
    """
    encoder = Encoder(tokenizer)
    frame = make_frame(encoder, settings.chat_template)
    haystack = load_haystack(settings.haystack, encoder, tokens=max(_HAYSTACK_TOKENS, 4 * max(settings.lengths)))
    settings = replace(settings, chat_template=frame.chat)
    settings = replace(settings, max_new_tokens=PromptMaker(settings, encoder, frame, haystack).max_new_tokens)
    maker = PromptMaker(settings, encoder, frame, haystack)
    for depth in settings.depths:  # if any length is too short, it is this one
        for sample in range(settings.samples):
            maker.make(min(settings.lengths), depth, sample)
    return maker, settings


def prompts_digest(maker: PromptMaker) -> str:
    """Hash over the first prompt of every cell, 16 hex digits."""
    digest = hashlib.sha256()
    for length in maker.settings.lengths:
        for depth in maker.settings.depths:
            digest.update(maker.make(length, depth, 0).digest().encode())
    return digest.hexdigest()[:16]


def finish(settings: Settings, run_dir: RunDir, trained: int | None, plot: bool, palette: str) -> dict[str, Any]:
    """Writes summary.json and heatmap.png from all records in the directory."""
    records: list[Record] = run_dir.records()
    name = model_name(settings.model)
    summary = summarize(settings, records, command="needle", model=name, out=str(run_dir.path))
    run_dir.write_summary(summary)
    if plot:
        panels = [
            Panel(method, cell_means(settings, records, method), summary["methods"][method]["exact"])
            for method in settings.methods
        ]
        per_cell = (
            f"{settings.samples} prompt{'s' if settings.samples > 1 else ''} per cell; beside each name: the mean"
        )
        head = title(settings, name)
        save(
            run_dir.path / "heatmap.png",
            draw(panels, settings.lengths, settings.depths, head, per_cell, trained, palette),
        )
    return summary
