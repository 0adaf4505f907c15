"""The command line: parses, calls, prints. Each command lives in a module with ``add_arguments`` and ``run``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from llm_accel import __version__
from llm_accel.errors import LlmAccelError, unknown_name

USAGE_ERROR = 2
INTERRUPTED = 130
BROKEN_PIPE = 141


@dataclass(frozen=True)
class Command:
    """One line of ``llm-accel --help``; the module is imported only when its command is called."""

    module: str
    help: str


COMMANDS = {
    "methods": Command("llm_accel.method_table", "the methods, what they cut, and their options"),
    "doctor": Command("llm_accel.doctor", "versions, GPU, and which kernels and backends are live and why not"),
    "needle": Command("llm_accel.eval.needle.command", "needle-in-a-haystack grid, several methods side by side"),
    "heads": Command("llm_accel.calibrate.heads.command", "find retrieval heads: scores per head, profile, heat map"),
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
        hint = "The same command with the same --out goes on where it stopped."
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
    name, *rest = arguments
    if name not in COMMANDS:
        raise LlmAccelError(unknown_name("command", name, COMMANDS))
    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    parser = argparse.ArgumentParser(prog=f"llm-accel {name}", description=command.help, allow_abbrev=False)
    module.add_arguments(parser)
    parsed, unknown = parser.parse_known_args(rest)
    if unknown:
        raise LlmAccelError(f"{name}: {unknown_name('option', unknown[0], _option_strings(parser))}")
    module.run(parsed)
    return 0


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
