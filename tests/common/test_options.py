"""Options are declared once: Python, the command line and JSON mean the same by them, and refuse the same."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, fields
from typing import Any, Literal

import pytest

from llm_accel import ConfigError
from llm_accel.calibrate.dyvte.command import CalibrateOptions
from llm_accel.calibrate.heads.command import HeadsOptions
from llm_accel.common.options import Options, option
from llm_accel.eval.tasks.bench.settings import BenchRunOptions, BenchSettings
from llm_accel.eval.tasks.needle.settings import NeedleSettings
from llm_accel.eval.tasks.ruler.settings import RulerRunOptions, RulerSettings
from llm_accel.eval.tasks.vision.settings import VisionRunOptions, VisionSettings
from llm_accel.serve.settings import ServeSettings
from tests.common.options_helpers import from_words

Colour = Literal["red", "blue"]
ALL = (
    NeedleSettings, RulerSettings, VisionSettings, BenchSettings, RulerRunOptions, VisionRunOptions, BenchRunOptions,
    HeadsOptions, CalibrateOptions, ServeSettings,
)  # fmt: skip


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


@dataclass(frozen=True, kw_only=True)
class Example(Options):
    count: int = option("how many", 2, least=1, group="run")
    share: float | None = option("of 100 % (default: all)", None, least=0)
    colours: tuple[Colour, ...] = option("several", ("red",), flag="--colour", choices=("red", "blue"), repeated=True)
    sizes: tuple[int, ...] = option("", (1, 2), parse=_numbers, shown="1,2", least=0, metavar="LIST")
    pair: tuple[str, ...] | None = option("two", None, metavar=("A", "B"), parse=tuple)
    quiet: bool = option("say less", False)
    plot: bool = option("draw", True)
    hidden: int = option("", 5, flag="")


def test_what_is_not_given_is_the_default_of_the_class():
    assert from_words(Example, []) == Example()


def test_the_command_line_and_python_mean_the_same():
    words = "--count 3 --share 0.5 --colour blue --colour red --sizes 4,5 --pair x y --quiet --no-plot"
    expected = Example(
        count=3, share=0.5, colours=("blue", "red"), sizes=(4, 5), pair=("x", "y"), quiet=True, plot=False
    )
    assert from_words(Example, words.split()) == expected
    assert Example.from_dict(json.loads(json.dumps(expected.to_dict()))) == expected


@pytest.mark.parametrize(
    ("given", "words", "message"),
    [
        ({"count": 0}, ["--count", "0"], "--count 0: give an integer of at least 1"),
        ({"share": float("nan")}, ["--share", "nan"], "--share nan: give a finite number of at least 0"),
        ({"share": float("inf")}, ["--share", "inf"], "--share inf: give a finite number of at least 0"),
        ({"sizes": (3, -1)}, ["--sizes=3,-1"], "--sizes -1: give an integer of at least 0"),
        ({"colours": ("red", "bleu")}, ["--colour", "red", "--colour", "bleu"], "Did you mean 'blue'"),
    ],
)
def test_both_are_refused_alike(given: dict[str, Any], words: list[str], message: str):
    for make in (lambda: Example(**given), lambda: from_words(Example, words)):
        with pytest.raises(ConfigError) as error:
            make()
        assert message in str(error.value)


def test_json_of_another_version_is_refused():
    with pytest.raises(ConfigError, match="not of this version"):
        Example.from_dict({"counts": 3})


def test_help_shows_defaults_choices_and_headings():
    parser = argparse.ArgumentParser(prog="x")
    Example.add_arguments(parser)
    text = " ".join(parser.format_help().split())
    for part in (
        "run: --count N how many (default: 2)", "of 100 % (default: all)", "--colour red|blue", "default: 1,2",
        "--pair A B", "--plot, --no-plot draw (default: on)", "--quiet say less",
    ):  # fmt: skip
        assert part in text, text
    assert "hidden" not in text and "no-quiet" not in text


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: f"{cls.__module__.split('.')[-2]}.{cls.__name__}")
def test_every_class_of_options_is_whole(cls: type[Options]):
    defaults = cls()
    assert cls.from_dict(json.loads(json.dumps(defaults.to_dict()))) == defaults
    for field in fields(cls):
        spec = field.metadata["spec"]
        assert spec.flag == "" or spec.help or field.default is not None, field.name
