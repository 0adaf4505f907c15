"""What a RULER run is made of: checks, and the part of it that a run directory is tied to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from llm_accel.common.arguments import DTYPES, at_least, flag, one_of
from llm_accel.errors import ConfigError, unknown_name
from llm_accel.eval.plain import PlainSettings
from llm_accel.eval.tasks.ruler.needles import Wording
from llm_accel.eval.tasks.ruler.tasks import BUNDLED, QA, TASKS, WITHOUT_DATA

DEFAULT_METHODS = ("dense", "snapkv:budget=256", "streaming_llm:budget=256", "random:budget=256")
DEFAULT_LENGTHS = "1k,2k,4k"
DEFAULT_SAMPLES = 10


@dataclass(frozen=True)
class Settings(PlainSettings):
    """Everything that decides what the records of a run say. Two runs with equal settings may share a directory.

    Attributes:
        model: HuggingFace id or path; None for the bundled model.
        methods: method specifications in canonical form, ``dense`` included, no two alike.
        lengths: tokens of prompt and answer together, ascending: RULER's ``max_seq_length``, met exactly.
        tasks: names of tasks.
        samples: prompts per task and length.
        wording: of needle tasks, see :mod:`llm_accel.eval.tasks.ruler.needles`.
        haystack: prose to hide needles in, see :mod:`llm_accel.eval.prompts.haystack`.
        words: a text file with words for the lists of ``cwe``; None for built-in ones.
        qa_1, qa_2: where questions about documents come from.
        chat_template: None for on if the tokenizer has one.
    """

    model: str | None = None
    methods: tuple[str, ...] = DEFAULT_METHODS
    lengths: tuple[int, ...] = (1024, 2048, 4096)
    tasks: tuple[str, ...] = BUNDLED
    samples: int = DEFAULT_SAMPLES
    wording: Wording = "ruler"
    haystack: str = "grammar"
    words: str | None = None
    qa_1: str | None = None
    qa_2: str | None = None
    query_agnostic: bool = False
    chat_template: bool | None = None
    batch_size: int = 1
    dtype: str = "auto"
    device: str = "auto"
    attn: str | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        at_least(1, samples=self.samples, batch_size=self.batch_size)
        one_of(get_args(Wording), wording=self.wording)
        one_of(DTYPES, dtype=self.dtype)
        for task in self.tasks:
            if task in QA and getattr(self, task) is None:
                raise ConfigError(
                    f"--tasks {task}: its data are not part of the package; give a file or a dataset as {flag(task)}."
                )


def parse_tasks(text: str | None, bundled: bool, data: tuple[str, ...]) -> tuple[str, ...]:
    """A comma-separated list of tasks; ``all`` are those that need no data, and the tasks in ``data``.

    None stands for all, and for the bundled model for those it was trained for.
    """
    everything = tuple(task for task in TASKS if task in WITHOUT_DATA or task in data)
    if text is None:
        return tuple(dict.fromkeys((*BUNDLED, *data))) if bundled else everything
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if names == ("all",):
        return everything
    for name in names:
        if name not in TASKS:
            raise ConfigError("--tasks: " + unknown_name("task", name, (*TASKS, "all")))
    if not names:
        raise ConfigError(f"--tasks is empty; give some of {', '.join(TASKS)}, or all.")
    return tuple(task for task in TASKS if task in names)
