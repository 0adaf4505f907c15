"""Settings of a benchmark."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llm_accel.common.arguments import DTYPES, METHOD, ModelOptions, OutputOptions, canonical_methods
from llm_accel.common.options import option
from llm_accel.errors import ConfigError
from llm_accel.eval.lengths import comma_list, lengths_option
from llm_accel.eval.summary import DENSE
from llm_accel.eval.tasks.bench.compare import TOLERANCE
from llm_accel.eval.tasks.bench.shapes import SHAPES
from llm_accel.patches.plan import DECODES, Decode

DEFAULT_METHODS = (DENSE, "snapkv:budget=512", "streaming_llm:budget=512")
DEFAULT_SHAPE = "small"

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(b|kib|mib|gib|tib|kb|mb|gb|tb)?", re.IGNORECASE)
_UNITS = {"b": 1} | {
    f"{prefix}{unit}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for unit, base in (("ib", 2**10), ("b", 10**3))
}


def parse_bytes(text: str, flag: str = "--memory-limit") -> int:
    """``80GiB``, ``24gb`` or a number of bytes; ``flag``: the option, for the message."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"{flag} {text!r} is not a size; give for example 80GiB or 500MiB.")
    return int(float(match[1]) * _UNITS[(match[2] or "b").lower()])


def parse_batches(text: str) -> tuple[int, ...]:
    """A comma-separated list of batch sizes, ascending, each once."""
    parts = comma_list(text)
    if not parts or not all(part.isdigit() and int(part) for part in parts):
        raise ConfigError(f"--batch {text!r} is not allowed; give positive integers such as 1,8.")
    return tuple(sorted({int(part) for part in parts}))


def _methods(specs: Sequence[str]) -> tuple[str, ...]:
    """The methods with the dense baseline, which every figure is compared with, first."""
    return (DENSE, *(method for method in canonical_methods(specs) if method != DENSE))


def _decodes(given: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(("eager", *given)))


@dataclass(frozen=True)
class Candidate:
    """One line of the comparison."""

    method: str  # specification as on the command line; ``dense`` is the plain model
    decode: Decode | Literal["static"] = "eager"  # static: the compiled static cache of transformers

    @property
    def name(self) -> str:
        """Its name in tables and plots."""
        return self.method if self.decode == "eager" else f"{self.method} ({self.decode})"


@dataclass(frozen=True, kw_only=True)
class BenchSettings(ModelOptions):
    """Everything that determines what is measured; ``methods`` begin with ``dense``, lengths and batches ascend."""

    model: str | None = option("HuggingFace text model, instead of a shape", None, metavar="ID|PATH")
    shape: str | None = option(f"geometry with random weights (default: {DEFAULT_SHAPE})", None, choices=tuple(SHAPES))
    changes: tuple[str, ...] = option(
        "repeatable; override one value of the shape, for example num_hidden_layers=8",
        (),
        flag="--set",
        metavar="KEY=VALUE",
        parse=tuple,
        shown="",
        repeated=True,
    )
    methods: tuple[str, ...] = option(
        f"repeatable; dense always runs as well (default: {' '.join(DEFAULT_METHODS[1:])})",
        DEFAULT_METHODS,
        flag="--method",
        metavar=METHOD,
        parse=_methods,
        repeated=True,
    )
    decodes: tuple[Decode, ...] = option(
        "repeatable; compiled also runs the compiled static cache of transformers, see --static (default: eager)",
        ("eager",),
        flag="--decode",
        choices=DECODES,
        parse=_decodes,
        repeated=True,
    )
    static: bool = option("with compiled decoding, the compiled static cache of transformers too", True)
    lengths: tuple[int, ...] = lengths_option("prompt lengths", "1k,4k")
    batches: tuple[int, ...] = option(
        "rows per call", (1,), flag="--batch", metavar="LIST", parse=parse_batches, shown="1"
    )
    new_tokens: int = option("tokens generated after the prompt, the first included", 32, least=4)
    rounds: int = option("interleaved repetitions of each cell", 5, least=1)
    memory_limit: int | None = option(
        "compute the largest batch that fits, for example 80GiB", None, metavar="SIZE", parse=parse_bytes
    )
    probe: bool = option("also find the largest batch by trial", False)
    dtype: str = option(
        "default: the checkpoint's; shapes: bfloat16 on a GPU, float32 on a CPU", "auto", choices=DTYPES, group="run"
    )
    seed: int = option("weights and prompts", 0)

    def validate(self) -> None:
        if self.model is None:
            self.resolve(shape=DEFAULT_SHAPE)
        elif self.shape is not None:
            raise ConfigError("give either --model or --shape.")
        elif self.changes:
            raise ConfigError("--set changes a --shape; a --model comes as it is.")
        if self.probe and self.memory_limit is None:
            raise ConfigError("--probe looks for the largest batch within --memory-limit; give a limit.")

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """Every method with every way of decoding. ``auto`` does not apply to the plain model; ``compiled`` adds the
        static cache of transformers."""
        static = [Candidate(DENSE, "static")] if self.static and "compiled" in self.decodes else []
        ours = [Candidate(method, decode) for decode in self.decodes for method in self.methods]
        return (*(one for one in ours if (one.method, one.decode) != (DENSE, "auto")), *static)


@dataclass(frozen=True, kw_only=True)
class BenchRunOptions(OutputOptions):
    """Where the result goes, and what to do with existing results."""

    out: str | None = option(
        "directory for bench.json and bench.png (default: runs/bench-<shape>)", None, metavar="DIR", group="output"
    )
    overwrite: bool = option("", False, flag="")
    compare: tuple[str, str] | None = option(
        "print two results side by side", None, metavar=("A.json", "B.json"), parse=tuple, group="existing results"
    )
    check: str | None = option(
        f"measure again; exit code 2 if a ratio to dense dropped by more than {100 * TOLERANCE:.0f} %",
        None,
        metavar="RESULT.json",
        group="existing results",
    )
