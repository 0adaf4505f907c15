"""``llm-accel lm-eval``: lm-evaluation-harness's own command line, with the model type ``llm_accel``."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from llm_accel.errors import ConfigError
from llm_accel.registry import parse_all, spec_of

TASKS = Path(__file__).parent / "lm_eval_tasks"
_SUBCOMMANDS = ("run", "ls", "validate")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Our one option; everything else is the harness's."""
    parser.usage = "llm-accel lm-eval [--method NAME[:OPTION=VALUE,...]] OPTIONS OF lm-eval"
    parser.add_argument(
        "--method", metavar="NAME[:OPTION=VALUE,...]", help="dense is the plain model (default: dense)", default="dense"
    )
    parser.epilog = (
        "All other options go to lm-eval; `llm-accel lm-eval run --tasks ... --model_args pretrained=ID`. Without "
        "pretrained= it runs the bundled needle model. Options of lm-eval: `lm-eval run --help`."
    )


def run(args: argparse.Namespace) -> None:
    """Hands over to the harness.

    Raises:
        LlmAccelError: the harness is not installed, or there is no such method.
    """
    method = spec_of(parse_all(args.method))
    try:
        importlib.import_module("lm_eval")
    except ImportError as error:
        raise ConfigError("lm-eval needs lm-evaluation-harness: pip install 'llm_accel[lm-eval]'.") from error
    importlib.import_module("llm_accel.integrations.lm_eval_model")
    before, sys.argv = sys.argv, ["lm-eval", *harness_arguments(args.others, method)]
    try:
        importlib.import_module("lm_eval.__main__").cli_evaluate()
    finally:
        sys.argv = before


def harness_arguments(given: Sequence[str], method: str) -> list[str]:
    """The harness's arguments: our model type, the method as one of its arguments, our tasks added to the harness's.

    Raises:
        ConfigError: another model type is asked for.
    """
    command, *rest = given if given and given[0] in _SUBCOMMANDS else ["run", *given]
    if not any(option.split("=")[0] == "--include_path" for option in rest):
        rest += ["--include_path", str(TASKS)]
    if command != "run":
        return [command, *rest]
    if any(option.split("=")[0] in ("--model", "-m", "-M") for option in rest):
        raise ConfigError("lm-eval: the model type is llm_accel; name the model as --model_args pretrained=ID.")
    return [command, "--model", "llm_accel", *rest, "--model_args", json.dumps({"method": method})]
