"""Objects that a caption names: the 80 categories of COCO with the words people use for them.

CHAIR (Rohrbach et al. 2018, arXiv 1809.02156) matches captions against such a list. This one is our own and shorter
than theirs, so figures are comparable with each other and not with published ones.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from llm_accel.eval.lengths import comma_list
from llm_accel.eval.rows import read_word_lists

# where such a word means something else, or is the first of two that mean one thing
_OTHERS = (
    r"(?:baby|mother|adult) (?=elephant|giraffe|zebra|bear|bird|cow|calf|horse|sheep|goat|duck)",
    r"orange (?!and\b|on\b|in\b|is\b|are\b|next\b|beside\b|with\b)(?=[a-z])",
    r"(?:orange|apple) (?:juice|pie|tree)s?",
    r"(?:train|bus|fire|gas|police) (?:track|station|stop|depot|platform)s?",
    r"(?:dog|cat|bird) (?:food|house|bowl|bed|bath|cage|park)s?",
    r"ski (?:slope|lift|pole|resort|mask|jump|run|suit|boot|goggle)s?",
    r"(?:table|tennis|car|boat|ball) (?:cloth|tennis|court|park|match|game|player|house|ride)s?",
    r"(?:bed|bath) ?rooms?|bed ?spreads?|book ?shel\w+|chair lifts?|carrot cakes?|pizza (?:boxe|box|oven|cutter)s?",
)


def categories() -> tuple[str, ...]:
    """The 80 names, in COCO's order."""
    return tuple(dict.fromkeys(_words().values()))


def objects_in(text: str) -> list[str]:
    """Categories named in a text, in order and with repetitions; where several words fit, the longest one counts."""
    words = _words()
    return [words[match["word"]] for match in _pattern().finditer(text.lower()) if match["word"]]


@cache
def _words() -> dict[str, str]:
    """Word or phrase, singular or plural -> category. ``coco.txt`` has the words of each; regular plurals are added."""
    found: dict[str, str] = {}
    for category, others in read_word_lists(Path(__file__).with_name("coco.txt")).items():
        for word in (category, *comma_list(others)):
            found[word] = category
            found.setdefault(_plural(word), category)
    return found


@cache
def _pattern() -> re.Pattern[str]:
    longest_first = sorted(map(re.escape, _words()), key=len, reverse=True)
    return re.compile(rf"\b(?:{'|'.join(_OTHERS)}|(?P<word>{'|'.join(longest_first)})\b)")


def _plural(word: str) -> str:
    if word.endswith(("s", "x", "ch", "sh")):
        return f"{word}es"
    if word.endswith("y") and word[-2] not in "aeou":
        return f"{word[:-1]}ies"
    return f"{word}s"
