"""One family from its name to its verdict."""

from __future__ import annotations

import time

from transformers import PreTrainedModel

from tests.families.build import TEXT, VISION, text_model, vision_model
from tests.families.check import judge_all
from tests.families.stock import CannotRun, Stock
from tests.families.verdict import NOT_BUILT, Family
from tests.families.vision import judge_vision

TEXT_KIND, VISION_KIND = "text", "vision"
# as the sweep calls them: some names are both
FAMILIES = (*(f"{TEXT_KIND}/{name}" for name in TEXT), *(f"{VISION_KIND}/{name}" for name in VISION))


def judge_family(case: str) -> Family:
    """The verdict on a case of ``FAMILIES``."""
    kind, name = case.split("/", 1)
    started = time.perf_counter()
    try:
        model = (text_model if kind == TEXT_KIND else vision_model)(name)
    except Exception as error:  # whatever a class of transformers raises is why it was not built
        family = Family(kind, NOT_BUILT, f"{type(error).__name__}: {str(error).strip()[:300]}")
    else:
        family = _judged(kind, name, model)
    family.seconds = round(time.perf_counter() - started, 1)
    return family


def _judged(kind: str, name: str, model: PreTrainedModel) -> Family:
    try:
        if kind == VISION_KIND:
            return Family.of(kind, *judge_vision(name, model))
        stock = Stock.of(model)
        return Family.of(kind, judge_all(stock), stock.notes)
    except CannotRun as error:
        return Family(kind, NOT_BUILT, f"built, but the unpatched model cannot answer: {error}")
