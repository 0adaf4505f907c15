"""Generation: what is measured, what is cut, and that a method is on the model only while it is measured."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

import llm_accel
from llm_accel.common.generation import cache_bytes, cut
from llm_accel.eval.engine import TextEngine
from llm_accel.eval.grid import GridPoint
from llm_accel.registry import parse_all
from tests.eval.needle_helpers import make_maker, tiny_model, tokenizer


class FakeHandle(SimpleNamespace):
    """Removes on exit, as a handle does."""

    def __enter__(self):
        return self

    def __exit__(self, *failure):
        self.remove()


def _prompts(length=300, count=2, new_tokens=6):
    maker = make_maker(chat_template=True, max_new_tokens=new_tokens)
    return [maker.make(GridPoint(length, 50.0, sample)) for sample in range(count)]


def _entry_bytes() -> int:
    return 2 * 2 * 2 * 8 * 4  # K and V, layers, KV heads, head dim, fp32


def _engine(agnostic=False, **kwargs):
    engine = TextEngine(tiny_model(), tokenizer(), agnostic, **kwargs)
    engine.ends = set()
    engine._options["eos_token_id"] = None  # a random model ends where it likes; here it never does
    return engine


@pytest.mark.parametrize("agnostic", [False, True])
def test_dense_answers_are_those_of_plain_generate(agnostic):
    prompts = _prompts()
    outcome = _engine(agnostic=agnostic).run(prompts, ())
    ids = torch.tensor([prompt.ids for prompt in prompts])
    plain = tiny_model().generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert outcome.answers == plain[:, 300:].tolist()
    assert outcome.kv_bytes == outcome.dense_kv_bytes == 305 * _entry_bytes()
    assert outcome.prefill_ms > 0 and outcome.decode_ms is not None and outcome.decode_ms > 0


@pytest.mark.parametrize("method", ["snapkv:budget=64", "streaming_llm:budget=64", "random:budget=64"])
@pytest.mark.parametrize("agnostic", [False, True])
def test_methods_hold_budget_question_and_answer(method, agnostic):
    prompts = _prompts()
    outcome = _engine(agnostic=agnostic).run(prompts, parse_all(method))
    (tail,) = {len(prompt.ids) - prompt.context_length for prompt in prompts}
    entries = 64 + 5 + (tail if agnostic else 0)  # the last new token is never fed
    if method.startswith("streaming"):
        entries = 64  # sinks and a ring: the budget holds while decoding too
    assert outcome.kv_bytes == entries * _entry_bytes()
    assert outcome.dense_kv_bytes == 305 * _entry_bytes()
    assert _engine().run(prompts, ()).answers == _engine().run(prompts, ()).answers
    llm_accel.apply(tiny_model(), parse_all(method)).remove()  # nothing was left behind


def test_rows_of_a_batch_answer_as_alone():
    prompts = _prompts(count=3)
    config = parse_all("snapkv:budget=64")
    together = _engine().run(prompts, config).answers
    assert together == [_engine().run([prompt], config).answers[0] for prompt in prompts]


def test_the_plugin_goes_even_if_generation_fails():
    events = []
    handle = FakeHandle(remove=lambda: events.append("removed"), new_cache=DynamicCache)

    def apply(model, config):
        events.append("applied")
        return handle

    engine = _engine(apply=apply)
    engine.model = SimpleNamespace(device=torch.device("cpu"), generate=lambda **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.run(_prompts(), parse_all("snapkv:budget=64"))
    assert events == ["applied", "removed"]


def test_a_fake_method_is_measured_through_its_report():
    report = SimpleNamespace(kv_bytes=10, dense_kv_bytes=30)
    handle = FakeHandle(remove=lambda: None, new_cache=DynamicCache, report=lambda: report)
    outcome = _engine(apply=lambda model, config: handle).run(_prompts(count=2), parse_all("snapkv:budget=64"))
    assert (outcome.kv_bytes, outcome.dense_kv_bytes) == (5, 15)


def test_answers_end_before_the_end_token():
    ends = {7, 9}
    assert cut([1, 2, 9, 7, 3], ends) == [1, 2] and cut([1, 2], ends) == [1, 2] and cut([7], ends) == []


def test_one_new_token_has_no_decode_time():
    assert _engine().run(_prompts(count=1, new_tokens=1), ()).decode_ms is None


def test_cache_bytes_counts_storage_once():
    cache = DynamicCache()
    big = torch.zeros(1, 2, 100, 8)
    cache.update(big[:, :, :10], big[:, :, 10:20], 0)
    assert cache_bytes(cache) <= 2 * big.nbytes
    cache.layers[0].keys, cache.layers[0].values = big[:, :, :10], big[:, :, 10:20]
    assert cache_bytes(cache) == big.nbytes  # views pin the whole storage, once
