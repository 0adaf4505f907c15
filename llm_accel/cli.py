"""The command line: parses, calls, prints. Each command lives in a module with ``add_arguments`` and ``run``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from llm_accel import __version__
from llm_accel.common.launch import check_alone, started_alone
from llm_accel.errors import LlmAccelError, unknown_name

USAGE_ERROR = 2
INTERRUPTED = 130
BROKEN_PIPE = 141


@dataclass(frozen=True)
class Command:
    """One line of ``llm-accel --help``; the module is imported only when its command is called.

    Attributes:
        alone: why it refuses to run in several processes, as launchers start them; empty where it does not.
        passes_on: whether options that it does not know are another program's; they arrive as ``others``.
    """

    module: str
    help: str
    alone: str = ""
    passes_on: bool = False


_WHOLE = "each of them would repeat the whole run in the same directory"

COMMANDS = {
    "methods": Command("llm_accel.method_table", "the methods, what they cut, and their options"),
    "doctor": Command("llm_accel.doctor", "versions, GPU, available kernels and backends, and why others are not"),
    "needle": Command(
        "llm_accel.integrations.needle_command", "needle-in-a-haystack grid, several methods side by side"
    ),
    "ruler": Command(
        "llm_accel.eval.tasks.ruler.command", "RULER's 13 long-context tasks at exact lengths, several methods"
    ),
    "leaderboard": Command(
        "llm_accel.eval.tasks.leaderboard.command", "RULER at compression 2:1 to 32:1: all KV methods, floors, dense"
    ),
    "vision": Command("llm_accel.eval.tasks.vision.command", "accuracy and hallucination with fewer visual tokens"),
    "bench": Command(
        "llm_accel.eval.tasks.bench.command",
        "speed and memory of methods, against dense and the bandwidth bound",
        alone="cells that run at the same time share cores and memory, which would distort their timings",
    ),
    "bench serve": Command(
        "llm_accel.eval.tasks.bench_serve.command", "load on OpenAI-compatible servers, side by side", alone=_WHOLE
    ),
    "plan": Command(
        "llm_accel.eval.tasks.plan.command", "bytes, largest batch and step time of a model before it is loaded"
    ),
    "heads": Command(
        "llm_accel.calibrate.heads.command", "find retrieval heads: scores per head, profile, heat map", alone=_WHOLE
    ),
    "calibrate": Command(
        "llm_accel.calibrate.dyvte.command", "find the layer after which visual tokens may leave", alone=_WHOLE
    ),
    "lm-eval": Command(
        "llm_accel.integrations.lm_eval_command", "lm-evaluation-harness on an accelerated model", passes_on=True
    ),
    "serve": Command(
        "llm_accel.serve.command",
        "OpenAI-compatible server on one accelerated model",
        alone="a server is one process on one port; for replicas see examples/ray_serve.py",
    ),
    "vllm": Command(
        "llm_accel.integrations.vllm.command",
        "vLLM's OpenAI-compatible server with fewer KV blocks or visual tokens",
        alone="vLLM starts its processes itself; see its --tensor-parallel-size and --data-parallel-size",
        passes_on=True,
    ),
    "transformers-serve": Command(
        "llm_accel.integrations.transformers_serve",
        "transformers' own server, every model accelerated",
        alone="a server is one process on one port",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. 0 on success, 2 on an error that llm_accel explains, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except LlmAccelError as error:
        print(f"llm-accel: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        hint = "Run the same command with the same --out to resume."
        print(f"\nllm-accel: interrupted. {hint}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `llm-accel methods | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        overview = _overview()
        overview.parse_args(arguments)
        overview.print_help()
        return 0
    command, parsed = parse(arguments)
    if command.alone:
        check_alone(arguments[0], command.alone)
    elif (warning := started_alone()) is not None:
        print(f"llm-accel: {warning}", file=sys.stderr)
    importlib.import_module(command.module).run(parsed)
    return 0


def parse(arguments: Sequence[str]) -> tuple[Command, argparse.Namespace]:
    """The command that these arguments name, and its options. :class:`LlmAccelError` for a name that does not exist."""
    name, *rest = arguments
    if rest and f"{name} {rest[0]}" in COMMANDS:
        name = f"{name} {rest.pop(0)}"
    if name not in COMMANDS:
        raise LlmAccelError(unknown_name("command", name, COMMANDS))
    command = COMMANDS[name]
    parser = argparse.ArgumentParser(prog=f"llm-accel {name}", description=command.help, allow_abbrev=False)
    importlib.import_module(command.module).add_arguments(parser)
    parsed, unknown = parser.parse_known_args(rest)
    if command.passes_on:
        parsed.others = unknown
    elif unknown:
        raise LlmAccelError(f"{name}: {unknown_name('option', unknown[0], _option_strings(parser))}")
    return command, parsed


def _option_strings(parser: argparse.ArgumentParser) -> list[str]:
    return [option for action in parser._actions for option in action.option_strings if option.startswith("--")]


def _overview() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="llm-accel",
        usage="llm-accel COMMAND [options]",
        description="Training-free inference acceleration for HuggingFace models.",
        epilog="commands:\n" + "\n".join(lines) + "\n\n`llm-accel COMMAND --help` lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"llm_accel {__version__}")
    return parser
