"""Comma-separated options, and prompt lengths: from the text of an option, and back to a label."""

from __future__ import annotations

import re
from typing import Any

from llm_accel.common.options import option
from llm_accel.errors import ConfigError

_LENGTH = re.compile(r"(\d+)([km]?)", re.IGNORECASE)
_UNIT = {"": 1, "k": 1024, "m": 1024**2}


def comma_list(text: str) -> list[str]:
    """The parts of a comma-separated list, in order, each once."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def parse_length(text: str, flag: str = "--lengths") -> int:
    """``512``, ``4k`` (4096) or ``1m`` (1048576) as a number of tokens; ``flag``: the option, for the message."""
    match = _LENGTH.fullmatch(text)
    if match is None or int(match[1]) == 0:
        raise ConfigError(f"{flag}: {text!r} is not a length; give positive integers or 1k = 1024 tokens.")
    return int(match[1]) * _UNIT[match[2].lower()]


def parse_lengths(text: str) -> tuple[int, ...]:
    """A comma-separated list of lengths, ascending, each once."""
    parts = comma_list(text)
    if not parts:
        raise ConfigError(f"--lengths {text!r} is empty; give for example --lengths 512,1k,2k.")
    return tuple(sorted({parse_length(part) for part in parts}))


def length_label(length: int) -> str:
    """4096 -> ``4k``, 1000 -> ``1000``."""
    if length % 1024**2 == 0:
        return f"{length // 1024**2}m"
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def lengths_option(help: str, default: str, group: str | None = None) -> Any:
    """``--lengths``."""
    return option(help, parse_lengths(default), metavar="LIST", parse=parse_lengths, shown=default, group=group)
