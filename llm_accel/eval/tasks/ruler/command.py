"""``llm-accel ruler``."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from llm_accel.common.launch import check_alone
from llm_accel.common.loading import load_text_model
from llm_accel.eval import runner
from llm_accel.eval.tasks.ruler.samples import write_samples
from llm_accel.eval.tasks.ruler.settings import RulerRunOptions, RulerSettings
from llm_accel.eval.tasks.ruler.task import RulerMaker, RulerTask


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of settings and run."""
    RulerSettings.add_arguments(parser)
    RulerRunOptions.add_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the tasks, see :func:`llm_accel.eval.runner.run`, or writes their prompts into a file."""
    settings, how = RulerSettings.from_arguments(args), RulerRunOptions.from_arguments(args)
    if how.write_samples is None:
        return runner.run(
            RulerTask, partial(RulerTask.load, palette=how.palette, shared_prefill=how.shared_prefill), settings, how
        )
    check_alone("ruler --write-samples", "it writes one file")
    _, tokenizer, settings = load_text_model(settings)
    summary = write_samples(Path(how.write_samples), RulerMaker.load(settings, tokenizer), how.shard)
    runner.print_summary(summary, None)
    return summary
