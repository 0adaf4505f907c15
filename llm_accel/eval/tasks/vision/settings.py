"""Settings of a vision run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from llm_accel.common.arguments import ModelOptions, canonical_methods
from llm_accel.common.options import one_of, option
from llm_accel.errors import ConfigError
from llm_accel.eval.lengths import comma_list
from llm_accel.eval.task import RunOptions
from llm_accel.eval.tasks.vision.controls import CONTROLS
from llm_accel.eval.tasks.vision.questions import TASKS
from llm_accel.eval.tasks.vision.scenes import SPLITS
from llm_accel.methods import MethodConfig
from llm_accel.methods.visual.base import VisualBudget
from llm_accel.registry import parse_all, spec_of

SCENES, QUESTIONS = "scenes", "questions"
PUBLISHED = ("pope", "chair")  # with questions of their own kind
DEFAULT_METHODS = ("dense", "flowcut", "stride_tokens", "random_tokens")
DEFAULT_SAMPLES = 100
PLACEHOLDER, QUESTION = "<image>", "{question}"


def parse_keep(text: str) -> tuple[float, ...]:
    """``0.11,0.22,0.33`` as shares of the visual tokens, ascending, each once."""
    try:
        shares = sorted({float(part) for part in comma_list(text)})
    except ValueError as error:
        raise ConfigError(f"--keep {text!r} is not allowed; give shares such as 0.11,0.22,0.33.") from error
    if not shares or not all(0 < share <= 1 for share in shares):
        raise ConfigError(f"--keep {text!r} is not allowed: shares are above 0 and at most 1, such as 0.11,0.22,0.33.")
    return tuple(shares)


@dataclass(frozen=True, kw_only=True)
class VisionSettings(ModelOptions):
    """Everything that determines the records of a vision run. Runs with equal settings may share a directory.

    ``methods`` are specifications in canonical form, ``dense``, ``blind`` and ``blank`` included, no two alike;
    ``samples`` None: all images that the data has; ``tasks`` None: all that the data asks;
    ``max_new_tokens`` None: as many as the longest answer needs.
    """

    model: str | None = option("HuggingFace model (default: the bundled vision model)", None, metavar="ID|PATH")
    gaps: bool = option("bundled model: weights trained on images with gaps, or those from before that training", True)
    methods: tuple[str, ...] = option(
        "repeatable; methods joined by + run together. dense is the plain model, blank a grey image, oracle keeps the "
        f"patches that objects cover (default: {' '.join(DEFAULT_METHODS)})",
        (*DEFAULT_METHODS, "blind"),
        flag="--method",
        metavar="NAME[:OPTION=VALUE,...][+NAME...]",
        repeated=True,
    )
    data: str = option(
        "generated scenes, also of a generator of yours, NAME, MODULE:FUNCTION or FILE.py:FUNCTION; your images, a "
        "folder with questions.jsonl or .csv; POPE or CHAIR on the rows of a .jsonl file or a dataset "
        "NAME[,split=test,config=NAME]",
        SCENES,
        metavar="scenes[:GENERATOR]|questions:PATH|pope:SOURCE|chair:SOURCE",
        group="data",
    )
    samples: int | None = option(
        f"images (default: {DEFAULT_SAMPLES} scenes, or all of a file or dataset)",
        DEFAULT_SAMPLES,
        least=1,
        group="data",
    )
    split: str = option("scenes with 1 to 4 objects, or 8 to 12", "standard", choices=tuple(SPLITS), group="data")
    tasks: tuple[str, ...] | None = option(
        f"questions to ask (default: all; of generated scenes {','.join(TASKS)})",
        None,
        metavar="LIST",
        parse=lambda text: tuple(comma_list(text)),
        group="data",
    )
    seed: int = option("seed of the scenes", 0, least=0, group="data")
    prompt: str | None = option(
        f"prompt template with {PLACEHOLDER} and {QUESTION} (default: the processor's chat template, else "
        f"'{PLACEHOLDER} {QUESTION}')",
        None,
        metavar="TEXT",
        group="run",
    )
    batch_size: int = option("questions about one image per call", 16, least=1, group="run")
    max_new_tokens: int | None = option("default: what the longest answer needs", None, least=1, group="run")

    def validate(self) -> None:
        if self.data == SCENES:
            self.resolve(tasks=TASKS)
            for task in self.tasks or ():
                one_of(TASKS, tasks=task)
        if self.tasks == ():
            raise ConfigError(f"--tasks is empty; give some of {', '.join(TASKS)}.")
        if self.model is not None and not self.gaps:
            raise ConfigError("--no-gaps chooses weights of the bundled model; leave --model or --no-gaps out.")
        kind, _, place = self.data.partition(":")
        if self.data != SCENES and not (place and kind in (SCENES, QUESTIONS, *PUBLISHED)):
            raise ConfigError(
                f"--data {self.data!r} is not allowed; give scenes, scenes:GENERATOR, questions:PATH, pope:SOURCE or "
                "chair:SOURCE."
            )
        if self.prompt is not None and not (self.prompt.count(PLACEHOLDER) == self.prompt.count(QUESTION) == 1):
            raise ConfigError(f"--prompt {self.prompt!r}: it must have {PLACEHOLDER} and {QUESTION}, each once.")

    @classmethod
    def from_arguments(cls, args: argparse.Namespace, **more: Any) -> Self:
        """With the rows of ``--keep`` and ``--blind``, and all rows of a file or dataset."""
        kind = (args.data or SCENES).partition(":")[0]
        for name, fits in (("split", args.data in (None, SCENES)), ("tasks", kind not in PUBLISHED)):
            if getattr(args, name) is not None and not fits:
                raise ConfigError(f"--{name} belongs to generated scenes, not --data {args.data!r}; leave it out.")
        if kind != SCENES:
            more["samples"] = args.samples
        methods: Sequence[str] = args.methods or DEFAULT_METHODS
        if args.keep is not None:
            methods = sweep(methods, parse_keep(args.keep))
        if args.blind is not False and "blind" not in methods:
            methods = (*methods, "blind")
        return super().from_arguments(args, methods=canonical_methods(methods, CONTROLS), **more)


@dataclass(frozen=True, kw_only=True)
class VisionRunOptions(RunOptions):
    """How a vision run is carried out, and rows that are added to those of ``--method``."""

    keep: tuple[float, ...] | None = option(
        "ratios of visual tokens to keep, such as 0.11,0.22,0.33: each --method without a budget of its own runs at "
        "each of them",
        None,
        metavar="LIST",
        parse=parse_keep,
    )
    blind: bool = option("also run the prompts without their image, to see what can be guessed", True)


def sweep(specs: Sequence[str], shares: Sequence[float]) -> tuple[str, ...]:
    """Every method that keeps a share of the visual tokens and was given none, at each of these; the others once.
    Raises :class:`ConfigError`: every method was given a share, or takes none."""
    found: list[str] = []
    for spec in specs:
        configs = parse_method(spec)
        place = next((i for i, config in enumerate(configs) if _open(config)), None)
        if place is None:
            found.append(spec)
        else:
            found += [spec_of((*configs[:place], at_share(configs[place], s), *configs[place + 1 :])) for s in shares]
    if found == list(specs):
        raise ConfigError("--keep: no --method takes a ratio of visual tokens without having one of its own.")
    return tuple(found)


def at_share(config: MethodConfig, share: float) -> MethodConfig:
    """A method that keeps this share of the visual tokens."""
    assert isinstance(config, VisualBudget)
    return replace(config, ratio=share)


def parse_method(spec: str) -> tuple[MethodConfig, ...]:
    """The methods of a specification; none for ``dense``. ``oracle``, ``blind`` and ``blank`` are known as well."""
    return parse_all(spec, CONTROLS)


def _open(config: MethodConfig) -> bool:
    return isinstance(config, VisualBudget) and config.budget is None and config.ratio is None
