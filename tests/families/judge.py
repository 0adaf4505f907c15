"""One family from its name to its verdict."""

from __future__ import annotations

import time

from tests.families.build import TEXT, VISION, text_model, vision_model
from tests.families.check import judge_all
from tests.families.stock import Stock
from tests.families.verdict import NOT_BUILT, Family

TEXT_KIND, VISION_KIND = "text", "vision"
# as the sweep calls them: some names are both
FAMILIES = (*(f"{TEXT_KIND}/{name}" for name in TEXT), *(f"{VISION_KIND}/{name}" for name in VISION))


def judge_family(case: str) -> Family:
    """The verdict on a case of ``FAMILIES``."""
    kind, name = case.split("/", 1)
    started = time.perf_counter()
    try:
        stock = Stock.of((text_model if kind == TEXT_KIND else vision_model)(name))
    except Exception as error:  # whatever transformers raises, building it or in its first call
        family = Family(kind, NOT_BUILT, f"{type(error).__name__}: {str(error).strip()[:300]}")
    else:
        family = Family.of(kind, judge_all(stock), stock.notes)
    family.seconds = round(time.perf_counter() - started, 1)
    return family
