"""What a vision run is made of: checks, and the part of it that a run directory is tied to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llm_accel.common.arguments import DTYPES, at_least, one_of
from llm_accel.errors import ConfigError
from llm_accel.eval.plain import PlainSettings
from llm_accel.eval.tasks.vision.controls import CONTROLS
from llm_accel.eval.tasks.vision.questions import TASKS
from llm_accel.eval.tasks.vision.scenes import SPLITS
from llm_accel.methods import MethodConfig
from llm_accel.methods.visual import VisualBudget
from llm_accel.registry import parse_all, spec_of

SCENES = "scenes"
KINDS = ("pope", "chair")
DEFAULT_METHODS = ("dense", "flowcut", "stride_tokens", "random_tokens")
DEFAULT_SAMPLES = 100
PLACEHOLDER, QUESTION = "<image>", "{question}"


@dataclass(frozen=True)
class Settings(PlainSettings):
    """Everything that decides what the records of a run say. Two runs with equal settings may share a directory.

    Attributes:
        model: HuggingFace id or path; None for the bundled model.
        gaps: of the bundled model, the weights that were trained on images with gaps.
        methods: method specifications in canonical form, ``dense``, ``blind`` and ``blank`` included, no two alike.
        data: ``scenes``, or where images come from, ``pope:SOURCE`` or ``chair:SOURCE``.
        split: how many things a scene has, see :mod:`llm_accel.eval.tasks.vision.scenes`.
        tasks: what is asked about scenes.
        samples: images; None for all that the data has.
        prompt: text of a prompt with ``<image>`` and ``{question}``; None for the processor's chat template, or
            ``<image> {question}`` if it has none.
        batch_size: prompts about one image that are answered together, at most.
        max_new_tokens: None for as many as the longest answer needs.
    """

    model: str | None = None
    gaps: bool = True
    methods: tuple[str, ...] = (*DEFAULT_METHODS, "blind")
    data: str = SCENES
    split: str = "standard"
    tasks: tuple[str, ...] = TASKS
    samples: int | None = DEFAULT_SAMPLES
    prompt: str | None = None
    batch_size: int = 16
    max_new_tokens: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    attn: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(1, samples=self.samples, batch_size=self.batch_size, max_new_tokens=self.max_new_tokens)
        at_least(0, seed=self.seed)
        one_of(SPLITS, split=self.split)
        one_of(DTYPES, dtype=self.dtype)
        for task in self.tasks:
            one_of(TASKS, tasks=task)
        if not self.tasks:
            raise ConfigError(f"--tasks is empty; give some of {', '.join(TASKS)}.")
        if self.model is not None and not self.gaps:
            raise ConfigError("--no-gaps chooses weights of the bundled model; leave --model or --no-gaps out.")
        kind, colon, place = self.data.partition(":")
        if self.data != SCENES and not (colon and place and kind in KINDS):
            raise ConfigError(f"--data {self.data!r} is not allowed; give scenes, pope:SOURCE or chair:SOURCE.")
        if self.prompt is not None and not (self.prompt.count(PLACEHOLDER) == self.prompt.count(QUESTION) == 1):
            raise ConfigError(f"--prompt {self.prompt!r}: it must have {PLACEHOLDER} and {QUESTION}, each once.")


def parse_keep(text: str) -> tuple[float, ...]:
    """``0.11,0.22,0.33`` as shares of the visual tokens, ascending, each once."""
    try:
        shares = sorted({float(part) for part in text.split(",") if part.strip()})
    except ValueError as error:
        raise ConfigError(f"--keep {text!r} is not allowed; give shares such as 0.11,0.22,0.33.") from error
    if not shares or not all(0 < share <= 1 for share in shares):
        raise ConfigError(f"--keep {text!r} is not allowed: shares are above 0 and at most 1, such as 0.11,0.22,0.33.")
    return tuple(shares)


def sweep(specs: Sequence[str], shares: Sequence[float]) -> tuple[str, ...]:
    """Every method that keeps a share of the visual tokens and was given none, at each of these; the others once.

    Raises:
        ConfigError: every method was given a share, or takes none.
    """
    found: list[str] = []
    for spec in specs:
        configs = parse_method(spec)
        place = next((i for i, config in enumerate(configs) if _open(config)), None)
        if place is None:
            found.append(spec)
        else:
            found += [spec_of((*configs[:place], at_share(configs[place], s), *configs[place + 1 :])) for s in shares]
    if found == list(specs):
        raise ConfigError("--keep: every --method takes no share of the visual tokens, or was given its own.")
    return tuple(found)


def at_share(config: MethodConfig, share: float) -> MethodConfig:
    """A method that keeps this share of the visual tokens."""
    assert isinstance(config, VisualBudget)
    return replace(config, keep_ratio=share)


def parse_method(spec: str) -> tuple[MethodConfig, ...]:
    """The methods of a specification; none for ``dense``. ``oracle``, ``blind`` and ``blank`` are known as well."""
    return parse_all(spec, CONTROLS)


def _open(config: MethodConfig) -> bool:
    return isinstance(config, VisualBudget) and config.target is None and config.keep_ratio is None
