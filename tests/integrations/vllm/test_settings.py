"""Which methods an engine may ask for, and what it is told of the others. Needs no vLLM."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from llm_accel import ConfigError, UnknownMethodError, list_methods
from llm_accel.integrations.vllm.settings import read_settings, refusal, settings_of
from llm_accel.methods import FlowCut, SnapKV
from llm_accel.registry import parse

REFUSED = {
    "adakv": "heads keep different numbers",
    "pyramidkv": "layers keep different numbers",
    "h2o": "single entries at every step",
    "retrieval_heads": "some of its heads",
    "kvzip": "a second time",
    "auto": "give the method itself",
    "hip": "replaces the attention kernel",
    "fastv": "between layers",
    "dyvte": "between layers",
    "vasparse": "second forward pass",
    "dart": "between layers",
    "divprune": "whole prompt",
    "cdpruner": "whole prompt",
    "prunesid": "whole prompt",
    "evs": "video_pruning_rate",
    "vidcom2": "video_pruning_rate",
    "vhr": "within each layer",
    "paint": "within each layer",
    "var": "within each layer",
    "downsample": "mm_processor_kwargs",
    "flowcut:llm_stage=on": "llm_stage=off",
    "snapkv:skip_layers=0+1": "whole layers",
    "streaming_llm:positions=cache": "turns keys anew",
    "random:budget=100+snapkv": "several methods",
    "dense:capacity=64": "no place",
}
TAKEN = ("snapkv", "random", "streaming_llm", "flowcut", "visionzip", "stride_tokens", "random_tokens", "dense")


def ask(method):
    return settings_of(SimpleNamespace(hf_overrides={"llm_accel": {"method": method}}))


@pytest.mark.parametrize("method", REFUSED)
def test_what_vllm_cannot_run_is_refused_with_the_reason(method):
    with pytest.raises(ConfigError, match=REFUSED[method]):
        ask(method)


def test_every_method_is_either_taken_or_refused():
    assert {name.partition(":")[0] for name in REFUSED} | set(TAKEN) >= set(list_methods())
    assert not [name for name in TAKEN if name != "dense" and refusal(parse(name)) is not None]


def test_a_visual_method_and_a_kv_method_go_together():
    settings = ask("flowcut+snapkv:budget=100")
    assert settings.kv == SnapKV(budget=100)
    assert settings.visual == FlowCut(llm_stage="off")  # images of many tokens have one stage here
    assert settings.spec == "flowcut:llm_stage=off+snapkv:budget=100"


def test_nothing_asked_for_is_nothing():
    assert settings_of(SimpleNamespace(hf_overrides={}, hf_config=SimpleNamespace())) is None
    assert ask("dense") is None


@pytest.mark.parametrize(
    "given", ["snapkv", {"methods": "snapkv"}, {"method": "snapkv", "budget": 8}, {"method": 3}, {}]
)
def test_another_form_is_explained(given):
    with pytest.raises(ConfigError, match=re.escape('give {"method": "NAME:OPTION=VALUE')):
        read_settings(given)


def test_a_wrong_name_gets_the_nearest_one():
    with pytest.raises(UnknownMethodError, match="Did you mean 'snapkv'"):
        ask("snapvk")
