"""``auto``: the laws of every method, what it chooses, and that it says so."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import llm_accel
from llm_accel import AdaKV, AlreadyAppliedError, Auto, ConfigError, HiP, KVzip, SnapKV, UnsupportedModelError
from llm_accel.common.bundled import load_needle_model
from llm_accel.methods import list_methods
from llm_accel.methods.budget import DEFAULT_BUDGET
from llm_accel.patches import auto
from tests.contracts.laws import (
    check_copied_cache,
    check_going_past_raises,
    check_no_memory,
    check_nothing_to_cut,
    check_undo,
    two_turns,
)
from tests.contracts.matrix import LONG, every_shape, generate, make_batch
from tests.tiny import sliding_mistral, tiny_model

BUDGET = 40
ENTRY = 3 * 2 * 2 * 16 * 4  # bytes of a token: layers, keys and values, heads, channels, fp32
questions = pytest.mark.parametrize("question", ["in_prompt", "later"])
families = pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek_v3", "qwen3_moe"])


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the machine had a kernel for heads of different lengths."""
    op = SimpleNamespace(choose=lambda problem: SimpleNamespace(name="triton"))
    monkeypatch.setattr(auto, "ragged_decode", SimpleNamespace(OP=op))


@families
@every_shape
def test_prompts_within_the_budget_are_dense(family: str, shape: str) -> None:
    model, batch = tiny_model(family), make_batch(shape, long=True)
    for config in (Auto(), Auto(budget=LONG), Auto(ratio=1), Auto(question="later")):
        check_nothing_to_cut(model, batch, config)


@families
@questions
def test_undo_is_exact(family: str, question: Any) -> None:
    check_undo(family, make_batch("single", long=True), Auto(question=question, budget=BUDGET))


@every_shape
@questions
def test_no_memory_between_calls(shape: str, question: Any) -> None:
    check_no_memory(tiny_model("llama"), shape, Auto(question=question, budget=BUDGET))


@questions
def test_copied_caches_and_lost_sessions(question: Any) -> None:
    check_copied_cache(Auto(question=question, budget=BUDGET))
    check_going_past_raises(Auto(question=question, budget=BUDGET))


@every_shape
def test_it_is_the_chosen_method_to_the_bit(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "_WINDOWS", 1)  # so few entries would be KVzip's
    model, batch = tiny_model("llama"), make_batch(shape, long=True)
    with llm_accel.apply(model, "auto", budget=BUDGET) as handle:
        assert handle.config == SnapKV(budget=BUDGET)
        ours, report = generate(model, batch), handle.report()
        turns = two_turns(model, batch, handle.new_cache(), full_ids=True)
    with llm_accel.apply(model, SnapKV(budget=BUDGET)) as handle:
        theirs = generate(model, batch)
        assert all(map(torch.equal, ours, theirs)) and report.kv_bytes == handle.report().kv_bytes
        assert all(map(torch.equal, turns, two_turns(model, batch, handle.new_cache(), full_ids=True)))
    assert report.chosen is not None and report.chosen in str(report) and report.to_dict()["chosen"] == report.chosen
    assert report.chosen.startswith(f"snapkv:budget={BUDGET}: ") and "the budget was given" in report.chosen


def chosen(method: Any, model: Any = None) -> tuple[Any, str]:
    with llm_accel.apply(model or tiny_model("llama"), method) as handle:
        said = handle.report().chosen
    assert said is not None
    return handle.config, said


def test_the_budget_is_a_quarter_of_the_longest_prompts() -> None:
    assert chosen("auto")[0] == SnapKV(budget=DEFAULT_BUDGET)  # made for 4096 tokens: a quarter would be less
    config, said = chosen("auto:context=40000")
    assert config == SnapKV(budget=10000) and "25% of prompts of 40000 tokens" in said
    assert chosen("auto:ratio=0.5")[0] == SnapKV(ratio=0.5)
    assert chosen("auto", tiny_model("llama", max_position_embeddings=65536))[0] == SnapKV(budget=16384)


def test_memory_bounds_the_budget() -> None:
    gib = 1000 * ENTRY / 2**30
    config, said = chosen(Auto(memory=gib))
    assert config == SnapKV(budget=1000) and "what memory holds" in said
    assert chosen(Auto(memory=gib, rows=4))[0] == SnapKV(budget=250)
    assert chosen(Auto(memory=3 * gib))[0] == SnapKV(budget=DEFAULT_BUDGET)
    sliding = (1000 * ENTRY // 3 + 2 * 16 * ENTRY // 3) / 2**30  # two of three layers hold a window of 16
    assert chosen(Auto(memory=sliding), tiny_model("gemma3"))[0] == SnapKV(budget=1000)
    with pytest.raises(ConfigError, match=r"memory=.* room for 128 entries .*; each prompt gets 125"):
        chosen(Auto(memory=gib, rows=8))


def test_the_question_in_the_prompt_takes_heads_by_need_where_a_kernel_reads_them(kernel: None) -> None:
    config, said = chosen("auto:budget=128")
    assert config == AdaKV(budget=128) and "the prompt asks" in said
    config, said = chosen([Auto(budget=128), HiP()])
    assert config == (SnapKV(budget=128), HiP()) and "; not adakv: " in said


def test_a_window_that_leaves_little_to_choose_is_not_asked() -> None:
    config, said = chosen("auto:budget=95")
    assert config == KVzip(budget=95) and "of 95 entries a window of 32 would leave too few to choose" in said
    assert chosen("auto:budget=96")[0] == SnapKV(budget=96)
    assert chosen("auto:ratio=0.05,context=1900")[0] == KVzip(ratio=0.05)
    assert chosen("auto:ratio=0.05,context=1901")[0] == SnapKV(ratio=0.05)
    config, said = chosen([Auto(budget=64), HiP()])
    assert config == (SnapKV(budget=64), HiP()) and "; not kvzip: " in said


def test_a_later_question_takes_kvzip() -> None:
    config, said = chosen("auto:question=later,budget=64")
    assert config == KVzip(budget=64) and "what is asked comes later" in said


def test_a_later_question_without_a_method_for_it_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    without = {name: list_methods()[name] for name in list_methods() if name != "kvzip"}
    monkeypatch.setattr(auto, "list_methods", lambda: without)
    config, said = chosen("auto:question=later")
    assert config == llm_accel.Dense() and "everything stays; not retrieval_heads: " in said
    config, said = chosen([Auto(question="later", budget=64), HiP()])
    assert config == HiP() and "everything stays" in said
    model, _ = load_needle_model()
    config, said = chosen("auto:question=later", model)
    assert config.name == "retrieval_heads" and config.sinks + config.recent == 4096  # a quarter of 16384


def test_what_apply_refuses_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="there is nothing to compress"):
        llm_accel.apply(AutoModelForCausalLM.from_config(sliding_mistral()), "auto")
    with pytest.raises(UnsupportedModelError, match="strict=True"):
        llm_accel.apply(tiny_model("gemma3"), "auto", strict=True)
    with pytest.raises(ConfigError, match="both decide which KV entries stay"):
        llm_accel.apply(tiny_model("llama"), ["auto", "snapkv"])
    model = tiny_model("llama")
    with llm_accel.apply(model, "auto"), pytest.raises(AlreadyAppliedError):
        llm_accel.apply(model, "auto")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("auto:budget=64,ratio=0.5", "give one of them"),
        ("auto:budget=64,memory=2", "give one of them"),
        ("auto:memory=0", "a number above 0, in GiB"),
        ("auto:question=maybe", "'in_prompt' or 'later'"),
        ("auto:budget=4", "kvzip: budget=4"),
    ],
)
def test_options_that_cannot_work(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        llm_accel.apply(tiny_model("llama"), spec)


def test_other_methods_choose_nothing() -> None:
    model, batch = tiny_model("llama"), make_batch("single", long=True)
    with llm_accel.apply(model, "snapkv", budget=BUDGET) as handle:
        generate(model, batch)
        assert handle.report().chosen is None and "chosen" not in str(handle.report())
