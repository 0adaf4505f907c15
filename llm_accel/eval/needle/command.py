"""``llm-accel needle``: arguments, and the run from arguments to summary."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from llm_accel.errors import ConfigError
from llm_accel.eval.needle import settings as s
from llm_accel.eval.needle.encoding import Encoder, make_frame
from llm_accel.eval.needle.engine import Engine
from llm_accel.eval.needle.environment import hardware, versions, weights_digest
from llm_accel.eval.needle.grammar import KEY_KINDS
from llm_accel.eval.needle.grid import places
from llm_accel.eval.needle.haystack import load_haystack
from llm_accel.eval.needle.heatmap import PALETTES, Panel, draw, require_matplotlib, save
from llm_accel.eval.needle.loading import load_model, model_name
from llm_accel.eval.needle.prompts import PromptMaker
from llm_accel.eval.needle.records import Record, RunDir
from llm_accel.eval.needle.runner import run_grid
from llm_accel.eval.needle.settings import Settings
from llm_accel.eval.needle.summary import cell_means, summarize
from llm_accel.eval.needle.table import render, title
from llm_accel.eval.needle.tasks import check_task
from llm_accel.registry import parse as parse_method

_HAYSTACK_TOKENS = 2**18  # what is read of a long haystack at least; prompts begin anywhere in it
_RESOLVED = ("chat_template", "max_new_tokens", "dtype", "device")  # settings that model and tokenizer may fill in


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command; values are checked later, in :class:`Settings`."""
    parser.add_argument("--model", metavar="ID|PATH", help="HuggingFace model (default: the bundled needle model)")
    parser.add_argument(
        "--method",
        action="append",
        metavar="NAME[:OPTION=VALUE,...]",
        dest="methods",
        help=f"repeatable; dense is the plain model (default: {' '.join(s.DEFAULT_METHODS)})",
    )
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
    task.add_argument(
        "--haystack",
        default="grammar",
        metavar="FILE|DIR|dataset:NAME",
        help="text to hide needles in (default: built-in sentences); "
        "dataset:NAME[,split=train,column=text,config=NAME] needs llm_accel[eval]",
    )
    task.add_argument(
        "--query-agnostic",
        action="store_true",
        help="compress the context before the question is known; the question follows on the same cache",
    )
    task.add_argument(
        "--chat-template",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="default: on if the tokenizer has one",
    )
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
    run_group.add_argument(
        "--dtype",
        default="auto",
        metavar="|".join(s.DTYPES),
        help="default: the checkpoint's; bundled model on a CPU: float32",
    )
    run_group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    run_group.add_argument("--attn", metavar="NAME", help="attention implementation (default: transformers' choice)")
    run_group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the prompts (default: %(default)s)"
    )
    out = parser.add_argument_group("output")
    out.add_argument(
        "--out",
        metavar="DIR",
        help="where results go; the same settings continue a run there (default: runs/needle-<settings>)",
    )
    out.add_argument("--overwrite", action="store_true", help="start anew in --out")
    out.add_argument(
        "--plot", action=argparse.BooleanOptionalAction, default=True, help="draw heatmap.png (default: on)"
    )
    out.add_argument("--palette", default="classic", choices=sorted(PALETTES), help="safe: for colour-blind readers")
    out.add_argument("--json-only", action="store_true", help="no table on stdout, only the JSON line")


def settings_from(args: argparse.Namespace) -> Settings:
    """Checked settings; raises :class:`ConfigError` or another :class:`llm_accel.LlmAccelError`."""
    needles = args.needles if args.needles is not None else 1 if args.task == "single" else 4
    settings = Settings(
        model=args.model,
        methods=s.canonical_methods(args.methods or s.DEFAULT_METHODS),
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
    """Runs the grid, prints the table and the summary as the last line of stdout, and returns the summary.

    Raises:
        LlmAccelError: anything wrong with the arguments, before anything is run or written.
    """
    settings, shard = settings_from(args), s.parse_shard(args.shard)
    if args.overwrite and shard[1] > 1:
        raise ConfigError("--overwrite with --shard would remove the records of the other shards; clear --out first.")
    if args.plot:
        require_matplotlib()
    if args.out and not args.overwrite:  # a large model loads for minutes: look first at what is known by now
        RunDir(Path(args.out)).check({key: value for key, value in settings.to_dict().items() if key not in _RESOLVED})
    model, tokenizer, settings = load_model(settings)
    maker, settings = make_prompts(settings, tokenizer)
    engine = Engine(model, tokenizer, maker.max_new_tokens, settings.query_agnostic)
    configs = {method: parse_method(method) for method in settings.methods}
    for config in configs.values():
        if config is not None:
            engine.try_method(config)
    trained = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if trained is not None and max(settings.lengths) + maker.max_new_tokens > trained:
        _say(f"warning: the model was made for {trained} tokens, the grid goes to {max(settings.lengths)}")

    tied = settings.to_dict() | {"prompt_hash": prompts_digest(maker), "weights_hash": weights_digest(model)}
    run_dir = RunDir(Path(args.out) if args.out else default_out(settings, tied))
    about = {
        "command": "needle",
        "versions": versions(),
        "hardware": hardware(model.device),
        "haystack_tokens": maker.haystack.tokens,
        "haystack_hash": maker.haystack.digest(),
        "argv": sys.argv[1:],
    }
    done = run_dir.open(tied, about, overwrite=args.overwrite)
    _say(f"results go to {run_dir.path}")
    for name in ("versions", "hardware"):
        if done and run_dir.about().get(name) != about[name]:
            _say(f"warning: the records there were made with other {name} (see run.json); times may not compare")
    try:
        run_grid(settings, engine, maker, configs, run_dir, done, places(settings, shard), shard)
    finally:
        summary = finish(settings, run_dir, trained, plot=args.plot, palette=args.palette)
    if not args.json_only:
        print(render(settings, summary, model_name(settings)))
    print(json.dumps(summary, separators=(",", ":")), flush=True)
    return summary


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


def default_out(settings: Settings, tied: dict[str, Any]) -> Path:
    """``runs/needle-<model>-<hash of settings, prompts and weights>``: the same command continues its own run."""
    name = Path(settings.model).name if settings.model else "bundled"
    digest = hashlib.sha256(json.dumps(tied, sort_keys=True).encode()).hexdigest()[:8]
    return Path("runs") / f"needle-{name}-{digest}"


def finish(settings: Settings, run_dir: RunDir, trained: int | None, plot: bool, palette: str) -> dict[str, Any]:
    """Writes summary.json and heatmap.png from all records in the directory."""
    records: list[Record] = run_dir.records()
    name = model_name(settings)
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
        save(run_dir.heatmap_file, draw(panels, settings.lengths, settings.depths, head, per_cell, trained, palette))
    return summary


def _say(text: str) -> None:
    print(text, file=sys.stderr)
