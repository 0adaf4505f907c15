"""``dense``: the plug-in changes nothing, to the bit, and takes nothing along when it goes."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import DynamicCache

import llm_accel
from llm_accel import ConfigError, Dense
from tests.contracts.laws import check_copied_cache, check_nothing_to_cut, two_turns
from tests.contracts.matrix import every_shape, generate, make_batch
from tests.patches.calls import Outside
from tests.tiny import tiny_model


@every_shape
@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek_v3"])
def test_it_is_the_model_to_the_bit(family: str, shape: str) -> None:
    model, batch = tiny_model(family), make_batch(shape, long=True)
    outside = Outside.of(model)
    check_nothing_to_cut(model, batch, Dense())
    assert Outside.of(model) == outside


def test_copied_caches_and_two_turns() -> None:
    check_copied_cache(Dense())
    model, batch = tiny_model("llama"), make_batch("single", long=True)
    with llm_accel.apply(model, "dense") as handle:
        ours = two_turns(model, batch, handle.new_cache(), full_ids=True)
        report = handle.report()
    with torch.no_grad():
        dense = two_turns(model, batch, DynamicCache(), full_ids=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours, dense, strict=True))
    assert report.kv_bytes == report.dense_kv_bytes and not report.warnings


def test_prompt_lookup_rolls_the_cache_back() -> None:
    model, batch = tiny_model("llama"), make_batch("single", long=True)
    expected = generate(model, batch)[0]
    with llm_accel.apply(model, "dense"):
        assert torch.equal(generate(model, batch, prompt_lookup_num_tokens=3)[0], expected)


def test_it_stands_alone() -> None:
    with pytest.raises(ConfigError, match="give it alone"):
        llm_accel.apply(tiny_model("llama"), ["dense", "snapkv"])
    with pytest.raises(ConfigError, match="capacity=0 is not allowed"):
        Dense(capacity=0)
