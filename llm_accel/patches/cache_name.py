"""What this transformers calls the cache that a model is given and returns; its newer releases gave it another name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Final

from transformers import GenerationMixin

_OLD: Final = "past_key_values"
_TAKEN = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE: Final = "cache" if "cache" in _TAKEN else _OLD


def named_cache(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call, with a cache that came under its deprecated name under the present one. Of two caches,
    transformers takes the one under the present name and says so."""
    if _OLD not in kwargs or CACHE in kwargs:
        return kwargs
    return {CACHE if name == _OLD else name: value for name, value in kwargs.items()}


def named(method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call of ``method`` by name, ``self`` left out."""
    names = list(inspect.signature(method).parameters)[1:]
    return kwargs | dict(zip(names, args, strict=False))
