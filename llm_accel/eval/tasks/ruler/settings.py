"""Settings of a RULER run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llm_accel.common.arguments import haystack_option, methods_option
from llm_accel.common.options import flag, option
from llm_accel.errors import ConfigError, unknown_name
from llm_accel.eval.lengths import comma_list, lengths_option
from llm_accel.eval.prompts.needles import WORDINGS, Wording
from llm_accel.eval.tasks.ruler.tasks import BUNDLED, QA, TASKS, WITHOUT_DATA
from llm_accel.eval.text_task import TextRunOptions, TextSettings

DEFAULT_METHODS = ("dense", "snapkv:budget=256", "streaming_llm:budget=256", "random:budget=256")
ALL = "all"


def parse_tasks(text: str) -> tuple[str, ...]:
    """A comma-separated list of tasks in RULER's order, or ``all``."""
    names = tuple(comma_list(text))
    if not names:
        raise ConfigError(f"--tasks is empty; give some of {', '.join(TASKS)}, or {ALL}.")
    for name in names:
        if name not in TASKS and names != (ALL,):
            raise ConfigError("--tasks: " + unknown_name("task", name, (*TASKS, ALL)))
    return names if names == (ALL,) else tuple(task for task in TASKS if task in names)


def _documents_option(task: str, name: str) -> Any:
    return option(
        f"questions and documents of {task}, {name} in RULER: a .json or .jsonl file or a dataset",
        None,
        metavar="FILE|NAME",
        group="prompts",
    )


@dataclass(frozen=True, kw_only=True)
class RulerSettings(TextSettings):
    """Everything that determines the records of a RULER run.

    ``tasks``: ``("all",)`` stands for all that need no data or were given it, None also for those, and for the bundled
    model for the ones it was trained for.
    """

    methods: tuple[str, ...] = methods_option("dense is the plain model", DEFAULT_METHODS)
    lengths: tuple[int, ...] = lengths_option(
        "exact number of tokens of prompt and answer together; 1k = 1024", "1k,2k,4k", "prompts"
    )
    tasks: tuple[str, ...] = option(
        f"some of {', '.join(TASKS)} (default: all that need no data; bundled model: those it was trained for)",
        None,
        metavar="LIST|all",
        parse=parse_tasks,
        group="prompts",
    )
    samples: int = option("prompts per task and length; RULER has 500", 10, least=1, group="prompts")
    haystack: str = haystack_option(
        "prose to hide needles in; RULER uses Paul Graham's essays, which are not included", "prompts"
    )
    words: str | None = option(
        "words for the lists of cwe (default: built-in ones)", None, metavar="FILE", group="prompts"
    )
    qa_1: str | None = _documents_option("qa_1", "SQuAD")
    qa_2: str | None = _documents_option("qa_2", "HotpotQA")
    wording: Wording = option(
        "wording of the needle tasks: RULER's, or the one the bundled model was trained on (default: by model)",
        None,
        choices=WORDINGS,
        group="prompts",
    )
    seed: int = option("seed of the prompts", 42, group="prompts")

    def validate(self) -> None:
        given = tuple(task for task in QA if getattr(self, task) is not None)
        everything = tuple(task for task in TASKS if task in WITHOUT_DATA or task in given)
        self.resolve(
            tasks=(*BUNDLED, *given) if self.model is None else everything,
            wording="bundled" if self.model is None else "ruler",
        )
        if self.tasks == (ALL,):
            object.__setattr__(self, "tasks", everything)
        for task in self.tasks:
            if task in QA and task not in given:
                raise ConfigError(
                    f"--tasks {task}: its data are not part of the package; give a file or a dataset as {flag(task)}."
                )

    @property
    def rows(self) -> tuple[Any, ...]:
        """Tasks."""
        return self.tasks


@dataclass(frozen=True, kw_only=True)
class RulerRunOptions(TextRunOptions):
    """How a RULER run is carried out."""

    write_samples: str | None = option(
        "only write the prompts as JSON lines, for other harnesses", None, metavar="FILE", group="output"
    )
