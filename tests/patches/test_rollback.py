"""An apply that fails half-way, wherever that is, leaves the model as it was, and another apply works."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import llm_accel
from llm_accel import DyVTE, FlowCut, SnapKV, StrideTokens, VASparse, api
from llm_accel.patches.install import install
from tests.tiny import tiny_model
from tests.tiny_vlm import ONE, inputs, tiny_vlm


class Injected(Exception):
    """What the tests let happen."""


class Failure:
    """Counts the lines that run inside ``install``, in the package's own files and each of them twice at most, and
    fails before one of them."""

    def __init__(self, at: int | None) -> None:
        self.at, self.steps, self._inside = at, 0, False
        self._seen: Counter[tuple[object, int]] = Counter()

    def __call__(self, frame: FrameType, event: str, value: object) -> Callable[..., Any] | None:
        if frame.f_code is install.__code__:
            self._inside = True
        if not self._inside or "/llm_accel/" not in frame.f_code.co_filename:
            return None
        place = frame.f_code, frame.f_lineno
        if event == "line" and self._seen[place] < 2:
            self._seen[place] += 1
            self.steps += 1
            if self.steps == self.at:
                raise Injected(f"{frame.f_code.co_name}:{frame.f_lineno}")
        if event == "return" and frame.f_code is install.__code__:
            self._inside = False
        return self


@contextmanager
def watched(failure: Failure) -> Iterator[None]:
    before = sys.gettrace()
    sys.settrace(failure)
    try:
        yield
    finally:
        sys.settrace(before)


def state(model: PreTrainedModel) -> list[object]:
    """All that an apply could change: attributes, hooks and attention of every part."""
    return [
        (
            name,
            {key: id(value) for key, value in vars(part).items() if not isinstance(value, dict)},
            [list(vars(part)[registry]) for registry in sorted(vars(part)) if registry.startswith("_forward")],
            getattr(getattr(part, "config", None), "_attn_implementation", None),
        )
        for name, part in model.named_modules()
    ]


CASES: dict[str, tuple[Callable[[], PreTrainedModel], Any, dict[str, Any]]] = {
    "text": (lambda: tiny_model("llama"), SnapKV(budget=8, window=2), {"mlp_chunk": 3, "decode": "compiled"}),
    "tower and cut": (tiny_vlm, [FlowCut(budget=4), DyVTE(exit=1)], {}),
    "several beside each other": (
        lambda: tiny_vlm("qwen2_vl"),
        [StrideTokens(budget=2), SnapKV(budget=8, window=2)],
        {"mlp_chunk": 3},
    ),
    "decode steps": (lambda: tiny_vlm("video_llava"), VASparse(), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_failure_at_each_step_is_undone(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, method, options = CASES[case]
    model = build()
    batch = {"input_ids": torch.arange(3, 15)[None]} if case == "text" else inputs(model, ONE)
    with torch.no_grad():
        dense = model(**batch).logits
    outside, every = state(model), Failure(None)
    with watched(every), llm_accel.apply(model, method, **options) as handle:
        plan = handle._hook.plan
    assert every.steps > 30 and state(model) == outside
    monkeypatch.setattr(api, "make_plan", lambda *_: plan)  # the same each time
    for step in range(1, every.steps):
        with watched(Failure(step)), pytest.raises(Injected) as error:
            llm_accel.apply(model, method, **options)
        assert state(model) == outside, error.value
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, dense)
    with llm_accel.apply(model, method, **options) as handle:
        assert state(model) != outside
        model.generate(**batch, max_new_tokens=2, do_sample=False)
        assert handle.report().layers
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, dense)
