"""What Python does for a compiled decode step beside running its graph: counted, since time depends on the machine."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import llm_accel
from benchmarks import compiled_host
from llm_accel.patches.cache_name import CACHE

OURS = str(Path(llm_accel.__file__).parent)
LAYERS = compiled_host.LAYERS


def calls(method: str) -> tuple[int, int]:
    """Calls of functions of ours, and of anything, in one step whose graph is a stub."""
    model: Any = compiled_host.model_of(method)
    counts = [0, 0]

    def count(frame: FrameType, event: str, argument: object) -> None:
        if event in ("call", "c_call"):
            counts[1] += 1
            counts[0] += event == "call" and frame.f_code.co_filename.startswith(OURS)

    token = torch.zeros(1, 1, dtype=torch.long)
    with compiled_host.stubbed(model):
        cache = llm_accel.Handle(model, model.generate.hook).new_cache()
        model(torch.ones(1, compiled_host.PROMPT, dtype=torch.long), **{CACHE: cache})
        for _ in range(3):
            model(token, **{CACHE: cache})
        sys.setprofile(count)
        try:
            model(token, **{CACHE: cache})
        finally:
            sys.setprofile(None)
    return counts[0], counts[1]


@pytest.mark.parametrize("method", compiled_host.METHODS)
def test_a_step_makes_few_calls_per_layer(method: str) -> None:
    """Five functions for each layer: whether it is whole, where it stands, the begin and the end of its step. None of
    them looks at its tensors, of which there are many."""
    ours, all_of_them = calls(method)
    assert 5 * LAYERS <= ours <= 5 * LAYERS + 64
    assert all_of_them <= 5 * LAYERS + 480
