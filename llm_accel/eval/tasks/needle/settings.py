"""What a needle run is made of: parsing, checks and the part of it that a run directory is tied to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from llm_accel.common.arguments import DTYPES, at_least, one_of
from llm_accel.errors import ConfigError
from llm_accel.eval.plain import PlainSettings
from llm_accel.eval.prompts.grammar import KEY_KINDS, Kind

Task = Literal["single", "multikey", "multivalue", "multiquery"]
TASKS: tuple[Task, ...] = ("single", "multikey", "multivalue", "multiquery")

DEFAULT_METHODS = ("dense", "snapkv:budget=128", "streaming_llm:budget=128", "random:budget=128")
DEFAULT_LENGTHS = "512,1k,2k,4k,8k"
DEFAULT_DEPTHS = "11"
MAX_DEPTHS = 101

_LENGTH = re.compile(r"(\d+)([km]?)", re.IGNORECASE)
_UNIT = {"": 1, "k": 1024, "m": 1024**2}


@dataclass(frozen=True)
class Settings(PlainSettings):
    """Everything that decides what the records of a run say. Two runs with equal settings may share a directory.

    Attributes:
        model: HuggingFace id or path; None for the bundled model.
        methods: method specifications in canonical form, ``dense`` included, no two alike.
        lengths: prompt lengths in tokens, ascending; the whole prompt with template, question and answer prefix.
        depths: where the first asked needle stands, percent of the haystack before it, ascending.
        samples: prompts per (length, depth).
        task: RULER's variant, see :mod:`llm_accel.eval.tasks.needle.tasks`.
        needles: needles that belong to the task.
        distractors: needles on top, with keys that nobody asks for.
        max_new_tokens: tokens generated at most; None for as many as the longest answer needs.
        chat_template: None for on if the tokenizer has one.
    """

    model: str | None = None
    methods: tuple[str, ...] = DEFAULT_METHODS
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    depths: tuple[float, ...] = tuple(10.0 * i for i in range(11))
    samples: int = 1
    task: Task = "multikey"
    needles: int = 4
    distractors: int = 0
    key_kind: Kind = "word"
    value_kind: Kind = "number"
    haystack: str = "grammar"
    query_agnostic: bool = False
    chat_template: bool | None = None
    answer_prefix: bool = True
    batch_size: int = 1
    max_new_tokens: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    attn: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(
            1,
            samples=self.samples,
            needles=self.needles,
            batch_size=self.batch_size,
            max_new_tokens=self.max_new_tokens,
        )
        at_least(0, distractors=self.distractors)
        one_of(TASKS, task=self.task)
        one_of(KEY_KINDS, key_kind=self.key_kind, value_kind=self.value_kind)
        one_of(DTYPES, dtype=self.dtype)
        if self.task == "single" and self.needles != 1:
            raise ConfigError(
                f"--task single --needles {self.needles}: single has one needle; "
                "use --task multikey, or --distractors for needles nobody asks for."
            )
        if self.task != "single" and self.needles < 2:
            raise ConfigError(f"--task {self.task} --needles {self.needles}: give at least 2, or --task single.")


def parse_length(text: str) -> int:
    """``512``, ``4k`` (4096) or ``1m`` (1048576) as a number of tokens."""
    match = _LENGTH.fullmatch(text.strip())
    if match is None or int(match[1]) == 0:
        raise ConfigError(f"--lengths: {text.strip()!r} is not a length; give positive integers or 1k = 1024 tokens.")
    return int(match[1]) * _UNIT[match[2].lower()]


def parse_lengths(text: str) -> tuple[int, ...]:
    """A comma-separated list of lengths, ascending, each once."""
    parts = [part for part in text.split(",") if part.strip()]
    if not parts:
        raise ConfigError(f"--lengths {text!r} is empty; give for example --lengths {DEFAULT_LENGTHS}.")
    return tuple(sorted({parse_length(part) for part in parts}))


def parse_depths(text: str) -> tuple[float, ...]:
    """``11`` is eleven depths from 0 to 100 percent; ``0,25,50`` (with a comma) is a list of percentages."""
    allowed = f"a number of depths (1 to {MAX_DEPTHS}) or a list of percentages such as 0,50,100 ('50,' for one depth)"
    if "," not in text:
        if not text.strip().isdigit() or not 1 <= int(text) <= MAX_DEPTHS:
            raise ConfigError(f"--depths {text!r} is not allowed; give {allowed}.")
        count = int(text)
        return (50.0,) if count == 1 else tuple(round(100 * i / (count - 1), 2) for i in range(count))
    try:
        depths = sorted({float(part) for part in text.split(",") if part.strip()})
    except ValueError as error:
        raise ConfigError(f"--depths {text!r} is not allowed; give {allowed}.") from error
    if not depths or not all(0 <= depth <= 100 for depth in depths):
        raise ConfigError(f"--depths {text!r} is not allowed: percentages are from 0 to 100; give {allowed}.")
    return tuple(depths)


def length_label(length: int) -> str:
    """4096 -> ``4k``, 1000 -> ``1000``."""
    if length % 1024**2 == 0:
        return f"{length // 1024**2}m"
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)
