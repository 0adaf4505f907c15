"""Arguments that several commands take."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping, Sequence

from llm_accel.errors import ConfigError, unknown_name
from llm_accel.methods import MethodConfig
from llm_accel.registry import parse_all, spec_of

# a parser or a group of its arguments
Arguments = argparse._ActionsContainer
DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_model(parser: Arguments, bundled: str) -> None:
    """``--model``; ``bundled``: which model runs without it."""
    parser.add_argument("--model", metavar="ID|PATH", help=f"HuggingFace model (default: the bundled {bundled} model)")


def add_methods(parser: Arguments, help: str) -> None:
    """``--method``, as often as wanted, as ``methods``."""
    parser.add_argument(
        "--method", action="append", metavar="NAME[:OPTION=VALUE,...]", dest="methods", help=f"repeatable; {help}"
    )


def add_haystack(parser: Arguments, holds: str) -> None:
    """``--haystack``."""
    parser.add_argument(
        "--haystack",
        default="grammar",
        metavar="FILE|DIR|dataset:NAME",
        help=f"{holds} (default: built-in sentences); dataset:NAME[,split=train,column=text,config=NAME] needs "
        "llm_accel[eval]",
    )


def add_prompt_form(parser: Arguments) -> None:
    """``--query-agnostic`` and ``--chat-template``."""
    parser.add_argument(
        "--query-agnostic",
        action="store_true",
        help="compress the context before the question is known; the question follows on the same cache",
    )
    parser.add_argument(
        "--chat-template",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="default: on if the tokenizer has one",
    )


def add_place(parser: Arguments, dtype: str = "the checkpoint's", attention: bool = True) -> None:
    """Where and how a model runs: ``--dtype``, ``--device`` and, where ``attention`` says so, ``--attn``."""
    parser.add_argument("--dtype", default="auto", metavar="|".join(DTYPES), help=f"default: {dtype}")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    if attention:
        parser.add_argument("--attn", metavar="NAME", help="attention implementation (default: transformers' choice)")


def add_run_output(parser: Arguments, command: str, draws: str) -> None:
    """Where a run that can be continued goes, and what is shown of it; ``draws``: with ``--plot``."""
    parser.add_argument(
        "--out",
        metavar="DIR",
        help=f"where results go; the same settings continue a run there (default: runs/{command}-<settings>)",
    )
    parser.add_argument("--overwrite", action="store_true", help="start anew in --out")
    add_shown(parser, draws)


def add_shown(parser: Arguments, draws: str) -> None:
    """``--plot`` and ``--json-only``."""
    parser.add_argument(
        "--plot", action=argparse.BooleanOptionalAction, default=True, help=f"draw {draws} (default: on)"
    )
    parser.add_argument("--json-only", action="store_true", help="no tables on stdout, only the JSON line")


def flag(name: str) -> str:
    """``batch_size`` -> ``--batch-size``."""
    return "--" + name.replace("_", "-")


def at_least(lowest: int, **given: int | None) -> None:
    """Raises :class:`ConfigError` for an option below ``lowest``; None is an option that is not given."""
    for name, value in given.items():
        if value is not None and value < lowest:
            raise ConfigError(f"{flag(name)} {value}: give an integer of at least {lowest}.")


def one_of(allowed: Iterable[str], **given: str) -> None:
    """Raises :class:`ConfigError` for an option that is none of the ``allowed`` ones."""
    names = tuple(allowed)
    for name, value in given.items():
        if value not in names:
            raise ConfigError(f"{flag(name)}: " + unknown_name("value", value, names))


def parse_shard(text: str) -> tuple[int, int]:
    """``2/4`` is the second of four shards; they are numbered from 1."""
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"--shard {text!r} is not allowed; give i/n with i from 1 to n, for example 1/4.")
    return int(match[1]), int(match[2])


def canonical_methods(specs: Sequence[str], more: Mapping[str, type[MethodConfig]] | None = None) -> tuple[str, ...]:
    """Methods in the form that records and tables show; raises for unknown ones and for two alike. ``more``: methods
    of this command only."""
    names: list[str] = []
    for spec in specs:
        name = spec_of(parse_all(spec, more))
        if name in names:
            raise ConfigError(f"--method {spec!r} is given twice.")
        names.append(name)
    return tuple(names)
