"""Errors that llm_accel raises. Each message says what was given, what is allowed and how to go on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LlmAccelError(Exception):
    """Base of every error raised on purpose by llm_accel."""


class UnknownMethodError(LlmAccelError, ValueError):
    """No method has this name."""


class ConfigError(LlmAccelError, ValueError):
    """An option has a value that the method cannot work with."""


class UnsupportedModelError(LlmAccelError, ValueError):
    """The model cannot be accelerated with this method."""


class AlreadyAppliedError(LlmAccelError, RuntimeError):
    """The model already carries a plug-in."""


class UnsupportedCallError(LlmAccelError, ValueError):
    """A forward or generate call asks for something that the applied method cannot do correctly."""


class EvictionError(LlmAccelError, RuntimeError):
    """A layer went past the plug-in, or a prompt longer than the budget went through and nothing was evicted."""


def nearest(given: str, allowed: Iterable[str]) -> list[str]:
    """The allowed names, those that look most like ``given`` first."""
    names = sorted(allowed)
    close = difflib.get_close_matches(given.lower(), names, n=3, cutoff=0.4)
    return close + [name for name in names if name not in close]


def unknown_name(kind: str, given: str, allowed: Iterable[str]) -> str:
    """One sentence for an unknown name: what was given, the nearest right name, everything allowed."""
    names = nearest(given, allowed)
    hint = ""
    if difflib.get_close_matches(given.lower(), names, n=1, cutoff=0.4):
        hint = f" Did you mean {names[0]!r}?"
    return f"unknown {kind} {given!r}.{hint} Allowed: {', '.join(names) if names else 'none'}."
