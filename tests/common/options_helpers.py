"""Options from a command line, as commands take them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TypeVar

from llm_accel.common.options import Options

OptionsT = TypeVar("OptionsT", bound=Options)


def from_words(cls: type[OptionsT], words: Sequence[str]) -> OptionsT:
    """What a command makes of its arguments."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    cls.add_arguments(parser)
    return cls.from_arguments(parser.parse_args(list(words)))
