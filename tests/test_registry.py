"""Method names, their text form, and what happens to values that cannot work."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import llm_accel
from llm_accel import (
    ConfigError,
    Dense,
    DyVTE,
    FlowCut,
    RandomKV,
    SnapKV,
    StreamingLLM,
    UnknownMethodError,
    list_methods,
)
from llm_accel.methods import PromptCompression, method_class
from llm_accel.methods.budget import DEFAULT_BUDGET, Budgeted
from llm_accel.methods.visual.base import VisualBudget
from llm_accel.registry import configure, parse, parse_all, spec_of
from tests.contracts.matrix import ATTENDING, BY_HEAD, CHOOSING, METHODS, VISUAL, WHOLE

every_method = pytest.mark.parametrize("name", list_methods())
every_budgeted = pytest.mark.parametrize(
    "name", [name for name, kind in list_methods().items() if issubclass(kind, Budgeted)]
)


def test_names_of_the_public_contract():
    assert {"snapkv": SnapKV, "streaming_llm": StreamingLLM, "random": RandomKV}.items() <= list_methods().items()


def test_the_registry_cannot_be_changed():
    with pytest.raises(TypeError):
        list_methods()["mine"] = SnapKV


def test_every_method_is_in_the_contract_matrix():
    assert {*METHODS, *BY_HEAD, *ATTENDING, *VISUAL, *WHOLE, *CHOOSING} == set(list_methods())


@every_method
def test_every_method_is_public_documented_and_immutable(name: str):
    kind = method_class(name)
    assert getattr(llm_accel, kind.__name__) is kind and kind.__name__ in llm_accel.__all__
    assert kind.__doc__ and kind.info.paper and kind.info.cuts
    assert all(field.metadata["help"] for field in dataclasses.fields(kind))
    config = kind()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.anything = 1
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert hash(config) == hash(kind())


def test_names_wait_for_torch_until_they_are_used():
    code = (
        "import sys, llm_accel; from llm_accel import ConfigError, cli; loaded = set(sys.modules)\n"
        "assert not hasattr(llm_accel, 'no_such_name') and 'torch' not in loaded\n"
        "assert llm_accel.SnapKV.name == 'snapkv' and 'SnapKV' in dir(llm_accel) and 'torch' in sys.modules\n"
        "assert not hasattr(llm_accel, 'PromptCompression') and llm_accel.methods.PromptCompression\n"
        "from llm_accel import *; assert SnapKV and apply and LlmAccelError and list_methods"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- text form -------------------------------------------------------------------------------------------------------


@every_method
def test_a_bare_name_is_the_default_configuration(name: str):
    config = method_class(name)()
    assert parse(name) == parse(f"{name}:") == parse(f" {name} ") == (None if name == "dense" else config)
    assert config.spec() == name


@pytest.mark.parametrize(
    "config",
    [
        SnapKV(budget=128),
        SnapKV(ratio=0.1 + 0.2, window=8, kernel=1, pool="avg", gqa="max", tie="index", score_dtype="compat"),
        SnapKV(ratio=1, skip_layers=(0, 7), compress="deferred", multi_turn="recompress"),
        StreamingLLM(budget=5, sinks=0),
        RandomKV(ratio=1e-9, seed=-3, window=0),
    ],
    ids=lambda config: config.spec(),
)
def test_text_form_round_trip(config):
    again = parse(config.spec())
    assert again == config and again.spec() == config.spec()


@given(
    budget=st.none() | st.integers(65, 10**9),
    ratio=st.none() | st.floats(0, 1, exclude_min=True),
    window=st.integers(1, 64),
    kernel=st.integers(0, 50).map(lambda half: 2 * half + 1),
    skip_layers=st.lists(st.integers(0, 200), unique=True).map(tuple),
)
def test_text_form_round_trip_for_all_values(budget, ratio, window, kernel, skip_layers):
    if budget is not None:
        ratio = None
    config = SnapKV(budget=budget, ratio=ratio, window=window, kernel=kernel, skip_layers=skip_layers)
    assert parse(config.spec()) == config


def test_spaces_none_and_dense():
    assert parse(" snapkv : budget = 64 , ratio = none ") == SnapKV(budget=64)
    assert parse("dense") is None and parse("dense:capacity=none") is None
    assert parse("dense:capacity=512") == Dense(capacity=512) and Dense(capacity=512).spec() == "dense:capacity=512"


def test_methods_joined_by_plus():
    spec = "flowcut:ratio=0.33 + dyvte+snapkv:skip_layers=0+1,budget=64"
    configs = parse_all(spec)
    assert configs == (FlowCut(ratio=0.33), DyVTE(), SnapKV(skip_layers=(0, 1), budget=64))
    assert spec_of(configs) == "flowcut:ratio=0.33+dyvte+snapkv:budget=64,skip_layers=0+1"
    assert parse_all(spec_of(configs)) == configs and spec_of(()) == "dense" and parse_all("dense") == ()
    with pytest.raises(ConfigError, match="joins 3 methods; give one"):
        parse(spec)
    with pytest.raises(UnknownMethodError, match=r"'snapvk'.*Did you mean 'snapkv'"):
        parse_all("flowcut:budget=8+snapvk:budget=64")
    with pytest.raises(UnknownMethodError, match="dense"):
        parse_all("dense+snapkv:budget=64")


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("snapvk", ["'snapvk'", "Did you mean 'snapkv'?", "streaming_llm", "dense"]),
        ("SnapKV:budget=64", ["'SnapKV'", "Did you mean 'snapkv'?"]),
        ("", ["unknown method ''", "snapkv"]),
    ],
)
def test_unknown_method_in_text(spec: str, parts: list[str]):
    with pytest.raises(UnknownMethodError) as caught:
        parse(spec)
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("snapkv:budgt=64", ["'budgt'", "Did you mean 'budget'?"]),
        ("snapkv:name=x", ["unknown option 'name'"]),
        ("snapkv:budget", ["'budget' is not of the form option=value"]),
        ("snapkv:budget=64,budget=65", ["budget", "twice"]),
        ("snapkv:budget=1.5", ["budget='1.5'", "an integer or None"]),
        ("snapkv:budget=", ["budget=''", "an integer"]),
        ("snapkv:ratio=nan", ["ratio=nan", "finite"]),
        ("snapkv:ratio=inf", ["ratio=inf", "finite"]),
        ("snapkv:pool=median", ["pool='median'", "'max' or 'avg'"]),
        ("snapkv:skip_layers=0+x", ["skip_layers='x'", "an integer"]),
        ("random:seed=first", ["seed='first'", "an integer"]),
        ("dense:budget=3", ["dense: unknown option 'budget'", "capacity"]),
    ],
)
def test_bad_option_in_text(spec: str, parts: list[str]):
    with pytest.raises(ConfigError) as caught:
        parse(spec)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


# --- Python form -----------------------------------------------------------------------------------------------------


def test_configure_takes_names_and_configurations():
    assert configure("snapkv", {"budget": 64}) == SnapKV(budget=64)
    assert configure(SnapKV(budget=64), {}) == SnapKV(budget=64)


@pytest.mark.parametrize("method", [SnapKV(budget=64), "snapkv:budget=64"])
def test_options_in_two_places_are_refused(method: Any):
    assert configure(method, {}) == SnapKV(budget=64)
    with pytest.raises(ConfigError, match=r"budget=32: 'snapkv:budget=64' has options of its own.*SnapKV\(budget=32\)"):
        configure(method, {"budget": 32})


@pytest.mark.parametrize("method", [None, 3, SnapKV, ["snapkv"]])
def test_configure_names_what_it_was_given(method: Any):
    with pytest.raises(ConfigError, match="give a method name"):
        configure(method, {})


def test_unknown_method_lists_names_nearest_first():
    with pytest.raises(UnknownMethodError, match=r"Did you mean 'streaming_llm'\? Allowed: streaming_llm"):
        configure("streamingllm", {})


@every_budgeted
@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"budget": 64, "ratio": 0.5}, "give one of them"),
        ({"budget": 0}, "budget=0"),
        ({"budget": -1}, "budget=-1"),
        ({"budget": True}, "budget=True"),
        ({"budget": 64.0}, "budget=64.0"),
        ({"budget": "64"}, "budget='64'"),
        ({"ratio": 0.0}, r"\(0, 1\]"),
        ({"ratio": -0.5}, r"\(0, 1\]"),
        ({"ratio": 1.0001}, r"\(0, 1\]"),
        ({"ratio": 2}, r"\(0, 1\]"),
        ({"ratio": 10**400}, "finite"),
        ({"ratio": float("nan")}, "finite"),
        ({"ratio": float("inf")}, "finite"),
        ({"ratio": True}, "finite"),
        ({"ratio": "0.5"}, "finite"),
        ({"skip_layers": 0}, "tuple"),
        ({"skip_layers": (0, 0)}, "distinct"),
        ({"skip_layers": (-1,)}, "counted from 0"),
        ({"skip_layers": (True,)}, "an integer"),
        ({"budgets": 64}, "Did you mean 'budget'"),
    ],
    ids=str,
)
def test_values_that_cannot_work(name: str, options: dict[str, Any], part: str):
    with pytest.raises(ConfigError, match=part) as caught:
        configure(name, options)
    assert str(caught.value).startswith(name)


VISUAL_BUDGETS = [name for name, kind in list_methods().items() if issubclass(kind, VisualBudget)]


@pytest.mark.parametrize("name", VISUAL_BUDGETS)
@pytest.mark.parametrize(("old", "new"), [("target", "budget"), ("keep_ratio", "ratio")])
def test_an_option_under_its_former_name_is_refused_with_the_new_one(name: str, old: str, new: str):
    message = f"{name}: the option '{old}' is now called '{new}'"
    for call in (
        lambda: method_class(name)(**{old: 1}),
        lambda: configure(name, {old: 1}),
        lambda: parse(f"{name}:{old}=1"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()


@every_method
def test_a_class_names_the_option_that_was_meant(name: str):
    kind = method_class(name)
    meant = dataclasses.fields(kind)[0].name
    with pytest.raises(ConfigError, match=rf"unknown option '{meant}_x'. Did you mean '{meant}'"):
        kind(**{f"{meant}_x": 1})


def test_lists_from_json_are_tuples():
    assert configure("snapkv", {"skip_layers": [0, 2]}) == SnapKV(skip_layers=(0, 2))


@pytest.mark.parametrize("name", [name for name, kind in list_methods().items() if issubclass(kind, PromptCompression)])
@pytest.mark.parametrize(
    ("options", "part"),
    [({"compress": "later"}, "'eager' or 'deferred'"), ({"multi_turn": None}, "'append' or 'recompress'")],
    ids=str,
)
def test_choices_of_prompt_compression(name: str, options: dict[str, Any], part: str):
    with pytest.raises(ConfigError, match=part):
        configure(name, options)


@pytest.mark.parametrize(
    ("build", "part"),
    [
        (lambda: SnapKV(budget=32), "above 32"),
        (lambda: SnapKV(budget=8, window=8), "above 8"),
        (lambda: SnapKV(window=DEFAULT_BUDGET), f"None means {DEFAULT_BUDGET}"),
        (lambda: SnapKV(window=0), "at least 1"),
        (lambda: SnapKV(kernel=4), "odd"),
        (lambda: SnapKV(kernel=0), "odd"),
        (lambda: SnapKV(kernel=-1), "odd"),
        (lambda: SnapKV(kernel=5.0), "an integer"),
        (lambda: SnapKV(window=True), "window=True"),
        (lambda: StreamingLLM(budget=4), "4 sinks"),
        (lambda: StreamingLLM(sinks=-1), "at least 0"),
        (lambda: RandomKV(window=-1), "at least 0"),
        (lambda: RandomKV(budget=32), "above 32"),
    ],
)
def test_values_that_one_method_cannot_work_with(build: Any, part: str):
    with pytest.raises(ConfigError, match=part):
        build()


def test_errors_share_a_base_and_stay_catchable_as_value_errors():
    assert issubclass(ConfigError, llm_accel.LlmAccelError) and issubclass(ConfigError, ValueError)
    assert issubclass(UnknownMethodError, llm_accel.LlmAccelError) and issubclass(UnknownMethodError, ValueError)


# --- budgets ---------------------------------------------------------------------------------------------------------


@given(
    length=st.integers(0, 5000),
    budget=st.none() | st.integers(33, 6000),
    ratio=st.none() | st.floats(0, 1, exclude_min=True),
)
def test_entries_never_exceed_prompt_or_budget(length: int, budget: int | None, ratio: float | None):
    if budget is not None:
        ratio = None
    config = SnapKV(budget=budget, ratio=ratio)
    kept = config.entries(length)
    assert min(length, config.window) <= kept <= length
    if ratio is None:
        assert kept == min(length, budget or DEFAULT_BUDGET)
    else:
        assert kept >= ratio * length - 1e-6 or kept == length
    if ratio == 1:
        assert kept == length


@given(lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=8), ratio=st.floats(0, 1, exclude_min=True))
def test_entries_of_rows_on_a_device_equal_entries_in_python(lengths: list[int], ratio: float):
    import torch

    for config in (SnapKV(ratio=ratio), StreamingLLM(ratio=ratio), SnapKV(budget=300)):
        on_device = config.entries_per_row(torch.tensor(np.array(lengths)))
        assert on_device.tolist() == [config.entries(length) for length in lengths]
