"""What a benchmark is made of: parsing and checks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llm_accel.common.arguments import DTYPES, at_least, one_of
from llm_accel.errors import ConfigError
from llm_accel.eval.plain import PlainSettings
from llm_accel.patches.plan import DECODES, Decode

DEFAULT_METHODS = ("dense", "snapkv:budget=512", "streaming_llm:budget=512")
DEFAULT_SHAPE = "small"
DENSE = "dense"

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(b|kib|mib|gib|kb|mb|gb)?", re.IGNORECASE)
_UNITS = {"b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


@dataclass(frozen=True)
class Contestant:
    """One line of the comparison.

    Attributes:
        method: specification as on the command line; ``dense`` is the plain model.
        decode: ``eager``, ``compiled`` or ``auto``; ``static`` is the compiled static cache of transformers, dense.
    """

    method: str
    decode: Decode | Literal["static"] = "eager"

    @property
    def name(self) -> str:
        """What tables and plots call it."""
        return self.method if self.decode == "eager" else f"{self.method} ({self.decode})"


@dataclass(frozen=True)
class Settings(PlainSettings):
    """Everything that decides what is measured.

    Attributes:
        model: HuggingFace id or path, or None for a shape.
        shape: geometry with random weights.
        changes: ``key=value`` overrides of its configuration.
        methods: specifications in canonical form, ``dense`` first.
        decodes: ways of decoding that every method runs in.
        lengths: prompt lengths in tokens, ascending.
        batches: rows per call, ascending.
        new_tokens: tokens generated after the prompt, the first included.
        rounds: times that every contestant runs each cell, in turns.
        memory_limit: bytes for which the largest batch is worked out, or None.
        probe: whether the largest batch is tried out beside the arithmetic.
    """

    model: str | None = None
    shape: str | None = DEFAULT_SHAPE
    changes: tuple[str, ...] = ()
    methods: tuple[str, ...] = DEFAULT_METHODS
    decodes: tuple[Decode, ...] = ("eager",)
    lengths: tuple[int, ...] = (1024, 4096)
    batches: tuple[int, ...] = (1,)
    new_tokens: int = 32
    rounds: int = 5
    memory_limit: int | None = None
    probe: bool = False
    dtype: str = "auto"
    device: str = "auto"
    attn: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.model is None) == (self.shape is None):
            raise ConfigError("give either --model or --shape.")
        if self.model is not None and self.changes:
            raise ConfigError("--set changes a --shape; a --model comes as it is.")
        if self.new_tokens < 4:
            raise ConfigError(f"--new-tokens {self.new_tokens}: give at least 4, the first two warm up.")
        at_least(1, rounds=self.rounds)
        if self.probe and self.memory_limit is None:
            raise ConfigError("--probe tries out the largest batch within --memory-limit; give one.")
        for decode in self.decodes:
            one_of(DECODES, decode=decode)
        one_of(DTYPES, dtype=self.dtype)

    @property
    def contestants(self) -> tuple[Contestant, ...]:
        """Every method in every way of decoding; ``auto`` means nothing to the plain model, and what transformers
        compiles stands beside what is compiled here."""
        static = [Contestant(DENSE, "static")] if "compiled" in self.decodes else []
        ours = [Contestant(method, decode) for decode in self.decodes for method in self.methods]
        return (*(one for one in ours if (one.method, one.decode) != (DENSE, "auto")), *static)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Settings:
        """What :meth:`to_dict` gave; ConfigError for anything else."""
        try:
            given: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items()}
            return cls(**given)
        except TypeError as error:
            raise ConfigError(f"these settings are not of this version: {error}.") from error


def with_dense(methods: Sequence[str]) -> tuple[str, ...]:
    """The methods with the dense baseline, which every figure is compared with, first."""
    return (DENSE, *(method for method in methods if method != DENSE))


def parse_bytes(text: str) -> int:
    """``80GiB``, ``24gb`` or a number of bytes."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"--memory-limit {text!r} is not a size; give for example 80GiB or 500MiB.")
    return int(float(match[1]) * _UNITS[(match[2] or "b").lower()])


def parse_batches(text: str) -> tuple[int, ...]:
    """A comma-separated list of batch sizes, ascending, each once."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() and int(part) for part in parts):
        raise ConfigError(f"--batch {text!r} is not allowed; give positive integers such as 1,8.")
    return tuple(sorted({int(part) for part in parts}))
