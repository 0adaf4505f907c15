"""Prompts that one prefill has read for several methods: each goes on as if it had read them itself."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedModel

import llm_accel
from llm_accel import UnsupportedCallError
from llm_accel.eval.engine import TextEngine
from llm_accel.eval.grid import GridPoint
from llm_accel.patches import context
from llm_accel.registry import parse, parse_all
from tests.eval.needle_helpers import make_maker, tokenizer
from tests.eval.needle_helpers import tiny_model as needle_model
from tests.patches.test_prefill import LONG, METHODS, SHORT, SNAPKV, decoded, held, same
from tests.tiny import prompt, tiny_model

OWN = ("streaming_llm:budget=24,positions=cache", "retrieval_heads:head_list=0.0+1.1,recent=16,sinks=4,full_budget=40")
SHARED = (*(m for m in METHODS if m not in OWN), "kvzip:ratio=0.4", "kvzip:ratio=0.3,division=head", "snapkv:ratio=1")
OTHERS = ("hip", "h2o:budget=24,semantics=sim", "snapkv:budget=24,window=8,compress=deferred", *OWN)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("prompts", [LONG, SHORT], ids=["long", "short"])
def test_every_method_goes_on_as_if_it_had_read_the_prompt(family: str, prompts: Any) -> None:
    model, (ids, mask), recording = tiny_model(family), prompts, None
    for method in SHARED:
        with llm_accel.apply(model, parse(method), trace=True) as handle:
            expected = decoded(model, input_ids=ids, attention_mask=mask)
            report = held(handle)
            recording = recording or handle.record(ids, mask)
            for _ in range(2):  # the recording stays as it is
                assert same(decoded(model, **handle.resume(recording).inputs), expected), method
                assert held(handle) == report, method


def test_nothing_that_is_kept_pins_the_recording(model: PreTrainedModel) -> None:
    ids = prompt(64)
    with llm_accel.apply(model, parse(SNAPKV)) as handle:
        recording = handle.record(ids)
        cache = handle.resume(recording)
    with llm_accel.apply(model, parse("snapkv:ratio=1")) as handle:
        whole = handle.resume(recording)
    mine = {layer.keys.untyped_storage().data_ptr() for layer in recording.layers}
    for layer in (*cache.layers, *whole.layers):
        assert layer.keys.untyped_storage().data_ptr() not in mine
        assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes


def test_a_prompt_is_read_again_once_for_all_budgets(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    passes, score = [], context._scores
    monkeypatch.setattr(context, "_scores", lambda *args: passes.append(args[3].spec()) or score(*args))
    recording = None
    for method in (
        "kvzip:ratio=0.5",
        "kvzip:ratio=0.25",
        "kvzip:budget=20",
        "kvzip:ratio=0.25,chunk=16",
        "kvzip:ratio=1",
    ):
        with llm_accel.apply(model, parse(method)) as handle:
            recording = recording or handle.record(prompt(64))
            handle.resume(recording)
    assert passes == ["kvzip:ratio=0.5", "kvzip:ratio=0.25,chunk=16"]


@pytest.mark.parametrize("method", OTHERS)
def test_methods_that_read_prompts_in_their_own_way_are_refused(method: str, model: PreTrainedModel) -> None:
    with llm_accel.apply(model, parse(SNAPKV)) as handle:
        recording = handle.record(prompt(40))
    with llm_accel.apply(model, parse(method)) as handle:
        assert not handle.can_resume
        with pytest.raises(UnsupportedCallError, match="cannot share a prefill"):
            handle.record(prompt(40))
        with pytest.raises(UnsupportedCallError, match="cannot share a prefill"):
            handle.resume(recording)


def test_so_are_caches_that_hold_no_keys() -> None:
    with (
        llm_accel.apply(tiny_model("deepseek_v3"), parse(SNAPKV)) as handle,
        pytest.raises(UnsupportedCallError, match="cannot share a prefill"),
    ):
        handle.record(prompt(40))


def test_recordings_of_half_a_prompt_or_of_another_model_are_refused(model: PreTrainedModel) -> None:
    with llm_accel.apply(model, parse(SNAPKV)) as handle:
        recording = handle.record(prompt(40))
        model.generation_config.prefill_chunk_size = 16
        try:
            with pytest.raises(UnsupportedCallError, match="prefill_chunk_size"):
                handle.record(prompt(40))
        finally:
            model.generation_config.prefill_chunk_size = None
    other = llm_accel.apply(needle_model(), parse(SNAPKV))
    with other as handle, pytest.raises(UnsupportedCallError, match="not of this model"):
        handle.resume(recording)


@pytest.mark.parametrize("agnostic", [False, True])
def test_an_evaluation_reads_each_prompt_once_and_answers_the_same(agnostic: bool) -> None:
    maker = make_maker(chat_template=True, max_new_tokens=6)
    prompts = [[maker.make(GridPoint(300, 50.0, sample))] for sample in range(2)]
    methods = ("dense", "snapkv:budget=64", "adakv:ratio=0.25", "hip:budget=64,sink=16,window=32", "kvzip:ratio=0.25")
    own, shared = (TextEngine(needle_model(), tokenizer(), agnostic, shared=shared) for shared in (False, True))
    model, read = needle_model(), []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda decoder, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        for some in prompts:
            for method in methods:
                expected = own.run(some, parse_all(method))
                read.clear()
                found = shared.run(some, parse_all(method))
                assert found.answers == expected.answers, method
                assert (found.kv_bytes, found.dense_kv_bytes) == (expected.kv_bytes, expected.dense_kv_bytes)
                assert found.prompt_bytes == expected.prompt_bytes and found.prefill_ms > 0
                whole = some[0].context_length if agnostic else 300
                assert (whole in read) == (method in ("dense", "hip:budget=64,sink=16,window=32")), method
    finally:
        hook.remove()
