"""``llm-accel needle``: answered by transformers, or by vLLM with ``--engine vllm``."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from typing import Any

from llm_accel.common.options import Options, option
from llm_accel.errors import ConfigError
from llm_accel.eval import runner
from llm_accel.eval.tasks.needle import command
from llm_accel.eval.tasks.needle.settings import NeedleSettings
from llm_accel.eval.text_task import TextRunOptions

ENGINES = ("transformers", "vllm")


@dataclass(frozen=True, kw_only=True)
class EngineOptions(Options):
    """What runs the model."""

    engine: str = option("what runs the model", "transformers", choices=ENGINES, group="run")
    block_size: int | None = option(
        "vllm: tokens per KV block, to which budgets are rounded down (default: vLLM's)", None, least=1, group="run"
    )

    def validate(self) -> None:
        if self.engine == "transformers" and self.block_size is not None:
            raise ConfigError(f"--block-size {self.block_size} is vLLM's; give --engine vllm, or leave it out.")


@dataclass(frozen=True, kw_only=True)
class VllmNeedleSettings(NeedleSettings, EngineOptions):
    """A run on vLLM. ``batch_size``: requests that run at once."""

    def validate(self) -> None:
        super().validate()
        EngineOptions.validate(self)
        wrong = {
            "--query-agnostic": bool(self.query_agnostic),
            f"--attn {self.attn}": self.attn is not None,
            f"--device {self.device}": self.device != "auto" and self.device.partition(":")[0] not in ("cpu", "cuda"),
        }
        for what, given in wrong.items():
            if given:
                raise ConfigError(
                    f"{what} is not for --engine vllm: a request comes with its question, and vLLM chooses device and "
                    "attention; leave it out, or give --engine transformers."
                )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of settings and run."""
    command.add_arguments(parser)
    EngineOptions.add_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the grid; see :func:`llm_accel.eval.runner.run`."""
    if EngineOptions.from_arguments(args).engine == "transformers":
        return command.run(args)
    from llm_accel.integrations.vllm.needle import VllmNeedleTask

    how = TextRunOptions.from_arguments(args)
    load = partial(VllmNeedleTask.load, palette=how.palette, shared_prefill=how.shared_prefill)
    return runner.run(VllmNeedleTask, load, VllmNeedleSettings.from_arguments(args), how)
