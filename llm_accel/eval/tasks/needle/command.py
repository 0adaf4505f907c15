"""``llm-accel needle``."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from llm_accel.eval import runner
from llm_accel.eval.tasks.needle.settings import NeedleSettings
from llm_accel.eval.tasks.needle.task import NeedleTask
from llm_accel.eval.text_task import TextRunOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of settings and run."""
    NeedleSettings.add_arguments(parser)
    TextRunOptions.add_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the grid; see :func:`llm_accel.eval.runner.run`."""
    how = TextRunOptions.from_arguments(args)
    return runner.run(
        NeedleTask,
        partial(NeedleTask.load, palette=how.palette, shared_prefill=how.shared_prefill),
        NeedleSettings.from_arguments(args),
        how,
    )
