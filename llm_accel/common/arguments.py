"""Options that several commands take."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_accel.common.options import Options, option
from llm_accel.errors import ConfigError
from llm_accel.methods import MethodConfig
from llm_accel.registry import parse_all, spec_of

DTYPES = ("auto", "float32", "bfloat16", "float16")
METHOD = "NAME[:OPTION=VALUE,...]"
LIST = "LIST"


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """Which model, and how it is loaded: HuggingFace id or path, or None for the bundled one."""

    model: str | None = option("HuggingFace model (default: the bundled needle model)", None, metavar="ID|PATH")
    dtype: str = option(
        "default: the checkpoint's; bundled model on a CPU: float32", "auto", choices=DTYPES, group="run"
    )
    device: str = option(
        "cpu, cuda, cuda:1, ... (default: cuda if there is one)", "auto", metavar="DEVICE", group="run"
    )
    attn: str | None = option(
        "attention implementation (default: transformers' choice)", None, metavar="NAME", group="run"
    )


@dataclass(frozen=True, kw_only=True)
class OutputOptions(Options):
    """Where results go and what is shown of them."""

    out: str | None = option(
        "output directory; a run with the same settings is resumed (default: runs/<command>-<settings>)",
        None,
        metavar="DIR",
        group="output",
    )
    overwrite: bool = option("discard the results in --out and start over", False, group="output")
    plot: bool = option("draw pictures", True, group="output")
    json_only: bool = option("print only the JSON line, no tables", False, group="output")


def methods_option(help: str, default: tuple[str, ...]) -> Any:
    """``--method``, as often as wanted, as ``methods``."""
    return option(
        f"repeatable; {help}",
        default,
        flag="--method",
        metavar=METHOD,
        parse=canonical_methods,
        shown=" ".join(default),
        repeated=True,
    )


def haystack_option(holds: str, group: str) -> Any:
    """``--haystack``."""
    return option(
        f"{holds} (default: built-in sentences); dataset:NAME[,split=train,column=text,config=NAME] needs "
        "llm_accel[eval]",
        "grammar",
        metavar="FILE|DIR|dataset:NAME",
        group=group,
    )


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
