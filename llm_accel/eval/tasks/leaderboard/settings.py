"""Settings of a leaderboard."""

from __future__ import annotations

from dataclasses import dataclass

from llm_accel.common.arguments import methods_option
from llm_accel.common.options import option
from llm_accel.errors import ConfigError
from llm_accel.eval.lengths import comma_list, parse_lengths
from llm_accel.eval.task import RunOptions
from llm_accel.eval.tasks.leaderboard.entries import complete
from llm_accel.eval.tasks.ruler.settings import RulerSettings
from llm_accel.eval.text_task import SHARED

RATIOS = "0.5,0.25,0.125,0.0625,0.03125"


@dataclass(frozen=True)
class Preset:
    """What is run where nothing else is asked for; ``tasks`` None: those of ``llm-accel ruler``."""

    lengths: str
    samples: int
    tasks: tuple[str, ...] | None


PRESETS = {
    "quick": Preset("1k", 5, ("niah_single_2", "niah_multikey_1")),
    "full": Preset("1k,2k,4k,8k", 50, None),
}


def parse_ratios(text: str) -> tuple[float, ...]:
    """A comma-separated list of shares above 0 and below 1, descending, each once."""
    try:
        ratios = {float(part) for part in comma_list(text)}
    except ValueError:
        ratios = set()
    if not ratios or not all(0 < ratio < 1 for ratio in ratios):
        raise ConfigError(f"--ratios {text!r}: give shares above 0 and below 1, for example {RATIOS}.")
    return tuple(sorted(ratios, reverse=True))


@dataclass(frozen=True, kw_only=True)
class LeaderboardSettings(RulerSettings):
    """Everything that determines the records of a leaderboard.

    ``methods``: without budget and ratio, which the board sets, and without dense, which is always there; the floors
    come last. ``query_agnostic``: None stands for both ways.
    """

    methods: tuple[str, ...] = methods_option(
        "without budget and ratio; dense and the floors are always there (default: every method that takes either and "
        "frees memory)",
        (),
    )
    preset: str = option(
        "lengths, samples and tasks of a look (2 tasks at 1k, 5 prompts each) or of a publication (1k to 8k, 50 each)",
        "quick",
        choices=tuple(PRESETS),
        group="prompts",
    )
    ratios: tuple[float, ...] = option(
        "shares of the prompt's KV entries to keep",
        parse_ratios(RATIOS),
        metavar="LIST",
        parse=parse_ratios,
        shown=RATIOS,
    )
    lengths: tuple[int, ...] = option(
        "exact number of tokens of prompt and answer together; 1k = 1024 (default: by --preset)",
        None,
        metavar="LIST",
        parse=parse_lengths,
        group="prompts",
    )
    samples: int = option("prompts per task and length (default: by --preset)", None, least=1, group="prompts")
    query_agnostic: bool | None = option(
        "only with the question after compression, or with --no-query-agnostic only before it (default: both)",
        None,
        group="prompts",
    )

    def validate(self) -> None:
        preset = PRESETS[self.preset]
        self.resolve(lengths=parse_lengths(preset.lengths), samples=preset.samples, tasks=preset.tasks)
        object.__setattr__(self, "methods", complete(self.methods))
        super().validate()

    @property
    def ways(self) -> tuple[bool, ...]:
        """Whether the question comes after compression, in each half of the board."""
        return (False, True) if self.query_agnostic is None else (self.query_agnostic,)


@dataclass(frozen=True, kw_only=True)
class LeaderboardRunOptions(RunOptions):
    """How a leaderboard is run."""

    shared_prefill: bool = option(SHARED, True, group="run")
