"""The sweep finds what is wrong: wrong logits, traces on the model, foreign errors, processes that hang."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import llm_accel
from llm_accel.report import Report
from tests.families import check
from tests.families.build import text_model
from tests.families.check import judge
from tests.families.methods import METHODS
from tests.families.oracle import Kept, kept_now
from tests.families.stock import Stock
from tests.families.sweep import Worker
from tests.families.verdict import FAILS, REFUSED, RIGHT, WRONG


@pytest.fixture(scope="module")
def stock() -> Stock:
    return Stock.of(text_model("llama"))


@pytest.mark.parametrize("method", METHODS)
def test_what_is_right_is_right(stock: Stock, method: str) -> None:
    verdict = judge(stock, method)
    assert (verdict.status, verdict.notes) == (RIGHT, [])
    assert verdict.error is not None and verdict.error <= stock.bar


@pytest.mark.parametrize("method", ["snapkv", "h2o", "streaming_llm", "adakv"])
def test_a_report_that_names_one_other_entry_is_wrong(
    stock: Stock, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shifted(report: Report) -> Kept:
        kept = kept_now(report)
        kept[1] = kept[1].clone()
        kept[1][0, 0, 0] += 1
        return kept

    monkeypatch.setattr(check, "kept_now", shifted)
    verdict = judge(stock, method)
    assert verdict.status == WRONG
    assert "single, first turn: logits off by" in verdict.why


def test_a_hook_that_stays_is_wrong(stock: Stock) -> None:
    def leaves_a_hook(trial: check.Trial) -> check.Verdict:
        stock.model.register_forward_hook(lambda *_: None)
        raise llm_accel.ConfigError("refused")

    verdict = check.judged(stock, leaves_a_hook)
    stock.model._forward_hooks.clear()
    assert verdict.status == WRONG
    assert "after a refusal: the model is not as before" in verdict.why


def test_changed_bits_are_wrong(stock: Stock) -> None:
    weight = next(stock.model.parameters())
    before = weight.detach().clone()

    def changes_a_weight(trial: check.Trial) -> check.Verdict:
        with torch.no_grad():
            weight.mul_(1.001)
        return check.Verdict(RIGHT)

    verdict = check.judged(stock, changes_a_weight)
    with torch.no_grad():
        weight.copy_(before)
    assert (verdict.status, verdict.why) == (WRONG, "after remove: logits are not bit-identical; ")


def test_errors_are_told_apart(stock: Stock, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        raise llm_accel.UnsupportedModelError("not this one")

    def fail(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("sizes differ")

    monkeypatch.setattr(check.llm_accel, "apply", refuse)
    assert (judge(stock, "snapkv").status, judge(stock, "snapkv").why) == (REFUSED, "not this one")
    monkeypatch.setattr(check.llm_accel, "apply", fail)
    assert (judge(stock, "snapkv").status, judge(stock, "snapkv").why) == (FAILS, "apply: RuntimeError: sizes differ")


def test_a_family_that_takes_too_long_fails_and_the_next_one_runs() -> None:
    worker = Worker(timeout=0.05)
    late = worker.judge("text/llama")
    worker.timeout = 300
    ended = worker.judge("text/no such family")
    worker.close()
    assert (late.status, late.why) == (FAILS, "no answer within 0 s")
    assert ended.status == "not built"
