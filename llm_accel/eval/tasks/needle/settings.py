"""Settings of a needle run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from llm_accel.common.arguments import haystack_option, methods_option
from llm_accel.common.options import option
from llm_accel.errors import ConfigError
from llm_accel.eval.lengths import comma_list, lengths_option
from llm_accel.eval.prompts import grammar
from llm_accel.eval.prompts.grammar import KEY_KINDS, Kind
from llm_accel.eval.prompts.needles import Needles
from llm_accel.eval.text_task import TextSettings

Task = Literal["single", "multikey", "multivalue", "multiquery"]
TASKS: tuple[Task, ...] = ("single", "multikey", "multivalue", "multiquery")

DEFAULT_METHODS = ("dense", "snapkv:budget=128", "streaming_llm:budget=128", "random:budget=128")
MAX_DEPTHS = 101


def parse_depths(text: str) -> tuple[float, ...]:
    """``11`` is eleven depths from 0 to 100 percent; ``0,25,50`` (with a comma) is a list of percentages."""
    allowed = f"a number of depths (1 to {MAX_DEPTHS}) or a list of percentages such as 0,50,100 ('50,' for one depth)"
    if "," not in text:
        if not text.strip().isdigit() or not 1 <= int(text) <= MAX_DEPTHS:
            raise ConfigError(f"--depths {text!r} is not allowed; give {allowed}.")
        count = int(text)
        return (50.0,) if count == 1 else tuple(round(100 * i / (count - 1), 2) for i in range(count))
    try:
        depths = sorted({float(part) for part in comma_list(text)})
    except ValueError as error:
        raise ConfigError(f"--depths {text!r} is not allowed; give {allowed}.") from error
    if not depths or not all(0 <= depth <= 100 for depth in depths):
        raise ConfigError(f"--depths {text!r} is not allowed: percentages are from 0 to 100; give {allowed}.")
    return tuple(depths)


@dataclass(frozen=True, kw_only=True)
class NeedleSettings(TextSettings):
    """Everything that determines the records of a needle run.

    ``task`` is one of RULER's variants (Hsieh et al. 2024, arXiv 2404.06654):

    ========== ========================== ======================================
    task       needles                    asked
    ========== ========================== ======================================
    single     1                          its value
    multikey   N keys, one value each     the value of one key, the others distract
    multivalue 1 key, N values            all values of the key
    multiquery N keys, one value each     the values of all keys
    ========== ========================== ======================================
    """

    methods: tuple[str, ...] = methods_option("dense is the plain model", DEFAULT_METHODS)
    lengths: tuple[int, ...] = lengths_option(
        "prompt lengths in tokens, template, question and answer prefix included; 1k = 1024",
        "512,1k,2k,4k,8k",
        "grid",
    )
    depths: tuple[float, ...] = option(
        "a number of depths from 0 to 100 %, or a list of percentages",
        parse_depths("11"),
        metavar="N|LIST",
        parse=parse_depths,
        shown="11",
        group="grid",
    )
    samples: int = option("prompts per cell", 1, least=1, group="grid")
    task: Task = option("RULER's variants", "multikey", choices=TASKS, group="prompts")
    needles: int = option(
        "needles of the task: keys, values of the key, or keys asked for (default: 4; single: 1)",
        None,
        least=1,
        group="prompts",
    )
    distractors: int = option("additional needles whose keys are not asked for", 0, least=0, group="prompts")
    key_kind: Kind = option("", "word", choices=KEY_KINDS, group="prompts")
    value_kind: Kind = option("", "number", choices=KEY_KINDS, group="prompts")
    haystack: str = haystack_option("text to hide needles in", "prompts")
    answer_prefix: bool = option("start the answer for the model, as RULER does", True, group="prompts")
    max_new_tokens: int | None = option("default: what the longest answer needs", None, least=1, group="run")

    def validate(self) -> None:
        self.resolve(needles=1 if self.task == "single" else 4)
        if self.task == "single" and self.needles != 1:
            raise ConfigError(
                f"--task single --needles {self.needles}: single has one needle; "
                "use --task multikey, or --distractors for needles that are not asked for."
            )
        if self.task != "single" and self.needles < 2:
            raise ConfigError(f"--task {self.task} --needles {self.needles}: give at least 2, or --task single.")
        keys, values = self.hidden.keys + self.distractors, self.needles + self.distractors
        if self.key_kind == "word" and keys > len(grammar.TEST_KEYS):
            raise ConfigError(f"{keys} word keys needed, there are {len(grammar.TEST_KEYS)}; use --key-kind number.")
        if self.value_kind == "word" and values > (pool := len(grammar.value_words())):
            raise ConfigError(f"{values} word values needed, there are {pool}; use --value-kind number.")

    @property
    def rows(self) -> tuple[Any, ...]:
        """Depths."""
        return self.depths

    @property
    def hidden(self) -> Needles:
        """The needles to hide and to ask for."""
        values = self.needles if self.task == "multivalue" else 1
        return Needles(
            keys=self.needles // values,
            values=values,
            queries=self.needles if self.task == "multiquery" else 1,
            distractors=self.distractors,
            key_kind=self.key_kind,
            value_kind=self.value_kind,
        )
