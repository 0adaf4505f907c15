"""``llm-accel vision``."""

from __future__ import annotations

import argparse
from typing import Any

from llm_accel.eval import runner
from llm_accel.eval.tasks.vision.settings import VisionRunOptions, VisionSettings
from llm_accel.eval.tasks.vision.task import VisionTask


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of settings and run."""
    VisionSettings.add_arguments(parser)
    VisionRunOptions.add_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the questions; see :func:`llm_accel.eval.runner.run`."""
    settings, how = VisionSettings.from_arguments(args), VisionRunOptions.from_arguments(args)
    return runner.run(VisionTask, VisionTask.load, settings, how)
