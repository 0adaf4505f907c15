"""``llm-accel leaderboard``."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from llm_accel.eval import runner
from llm_accel.eval.tasks.leaderboard.settings import LeaderboardRunOptions, LeaderboardSettings
from llm_accel.eval.tasks.leaderboard.task import LeaderboardTask


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of settings and run."""
    LeaderboardSettings.add_arguments(parser)
    LeaderboardRunOptions.add_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the board; see :func:`llm_accel.eval.runner.run`."""
    settings, how = LeaderboardSettings.from_arguments(args), LeaderboardRunOptions.from_arguments(args)
    return runner.run(LeaderboardTask, partial(LeaderboardTask.load, shared_prefill=how.shared_prefill), settings, how)
