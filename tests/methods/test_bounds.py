"""Every option has an upper bound, and at its bound a method still works in bounded time and memory."""

from __future__ import annotations

import dataclasses
import re
import resource
import time
import typing
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import llm_accel
from llm_accel import ConfigError, LlmAccelError, list_methods
from llm_accel.methods.base import ENTRIES, INT64, LAYERS, MethodConfig, option
from llm_accel.registry import parse
from tests.tiny import prompt, tiny_model
from tests.tiny_vlm import decode, inputs, tiny_vlm

NEW, SECONDS, MIB = 6, 30.0, 500


def numbers(kind: type[MethodConfig]) -> dict[str, float]:
    """The options that hold numbers, and their bounds."""
    hints = typing.get_type_hints(kind)
    texts = {field.name: repr(hints[field.name]) for field in dataclasses.fields(kind)}
    return {
        field.name: field.metadata["most"]
        for field in dataclasses.fields(kind)
        if "int" in texts[field.name] or "float" in texts[field.name]
    }


OPTIONS = [(name, field) for name, kind in list_methods().items() for field in numbers(kind)]


@pytest.mark.parametrize(("name", "field"), OPTIONS)
def test_nothing_beyond_the_bound(name: str, field: str) -> None:
    kind, most = list_methods()[name], numbers(list_methods()[name])[field]
    one = getattr(kind(), field)
    for huge in (most + most, -most - most, 10**400, 10**5000):
        for value in (huge, (huge,), ((huge, 1, 1),)):
            with pytest.raises(ConfigError) as caught:
                kind(**{field: value})
            assert field in str(caught.value) and "give" in str(caught.value) and len(str(caught.value)) < 500
    assert getattr(kind(), field) == one


BOUNDED = [
    (name, field)
    for name, kind in list_methods().items()
    for field in dataclasses.fields(kind)
    if field.metadata["least"] is not None or field.metadata["share"] is not None
]


@pytest.mark.parametrize(("name", "field"), BOUNDED, ids=lambda value: getattr(value, "name", value))
def test_nothing_below_the_bound(name: str, field: dataclasses.Field[Any]) -> None:
    least, share = field.metadata["least"], field.metadata["share"]
    allowed = f"of at least {least}" if share is None else re.escape(f"a number in {share}")
    wrong = [least - 1, -(10**6)] if share is None else [-0.5, 1.5, *([0.0] if share == "(0, 1]" else [])]
    for value in wrong:
        with pytest.raises(ConfigError, match=rf"^{name}: {field.name}={value}(\.0)? is not allowed; give .*{allowed}"):
            list_methods()[name](**{field.name: value})


def test_what_was_given_and_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match=r"kernel=1000000001 is not allowed; give at most 255\."):
        parse("snapkv:kernel=1000000001")
    with pytest.raises(ConfigError, match=rf"seed=-9223372036854775808 is not allowed; give at least -{INT64}\."):
        parse("random:seed=-9223372036854775808")
    with pytest.raises(ConfigError, match=rf"skip_layers=\(0, 5000\) is not allowed; give at most {LAYERS}\."):
        parse("snapkv:skip_layers=0+5000")
    with pytest.raises(ConfigError, match="at most 65536 items"):
        llm_accel.RetrievalHeads(head_list=("0.0",) * 70_000)
    with pytest.raises(ConfigError, match=r"kernel=\(an integer of \d+ bits\)"):
        llm_accel.SnapKV(kernel=10**5000)


def test_a_method_of_a_third_party_needs_no_bounds_of_its_own() -> None:
    @dataclass(frozen=True)
    class Theirs(MethodConfig):
        size: int = 3
        other: int = option("one without a bound", 3)
        name: ClassVar[str] = "theirs"

    assert Theirs(size=INT64, other=-INT64) != Theirs()
    for field in ("size", "other"):
        with pytest.raises(ConfigError, match=f"{field}=9223372036854775808"):
            Theirs(**{field: INT64 + 1})


# what else an option needs to be at its bound
BESIDE: dict[tuple[str, str], dict[str, Any]] = {
    ("snapkv", "window"): {"budget": 2 * ENTRIES},
    ("pyramidkv", "window"): {"budget": 2 * ENTRIES},
    ("adakv", "window"): {"budget": 2 * ENTRIES},
    ("adakv", "beta"): {"base": "pyramidkv", "budget": 40},
    ("random", "window"): {"budget": 2 * ENTRIES},
    ("streaming_llm", "sinks"): {"budget": 2 * ENTRIES},
    ("h2o", "sinks"): {"budget": 2 * ENTRIES, "recent": 2},
    ("h2o", "recent"): {"budget": 2 * ENTRIES},
    ("h2o", "heavy"): {"budget": 2 * ENTRIES},
    ("hip", "refresh"): {"window": ENTRIES},
}
COMMON = {"budget": 40, "min_prefill_len": 0}


def at_its_bound(name: str, field: str, sign: int) -> MethodConfig:
    kind, most = list_methods()[name], numbers(list_methods()[name])[field]
    value: Any = sign * (most if isinstance(most, int) else float(most))
    if typing.get_origin(typing.get_type_hints(kind)[field]) is tuple:
        value = (value,)
    if field == "refresh":
        value = (value[0],) * 3
    common = {key: given for key, given in COMMON.items() if name != "hip" or key != "budget"}
    names = {one.name for one in dataclasses.fields(kind)} - {field, "ratio" if field == "budget" else "budget"}
    beside = BESIDE.get((name, field), {key: given for key, given in common.items() if key in names})
    return kind(**beside, **{field: value})


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("name", "field"), OPTIONS)
def test_the_bound_itself_costs_no_more_than_a_call_may(name: str, field: str, sign: int) -> None:
    """Refused with a reason, or done: never an overflow, and no work or memory that grows with the number."""
    try:
        config = at_its_bound(name, field, sign)
    except ConfigError:
        return
    model = tiny_model("llama") if "text" in config.info.kinds else tiny_vlm()
    peak, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    try:
        with llm_accel.apply(model, config), torch.no_grad():
            if "text" in config.info.kinds:
                model.generate(prompt(300), max_new_tokens=NEW, do_sample=False)
            else:
                decode(model, inputs(model))
    except LlmAccelError:
        pass
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
    assert time.monotonic() - begin < SECONDS and grown < MIB, f"{grown:.0f} MiB"


def test_seeds_draw_as_before() -> None:
    """The hash reads 32 bits of a seed, so that every seed of 64 bits works and small ones keep their positions."""
    model, ids = tiny_model("llama"), prompt(80)

    def kept(seed: int) -> Any:
        with llm_accel.apply(model, "random", budget=30, window=4, seed=seed, trace=True) as handle:
            model.generate(ids, max_new_tokens=2, do_sample=False)
            return [layer.kept for layer in handle.report().layers]

    same, other = kept(5), kept(6)
    assert all(map(torch.equal, kept(5 + 2**32), same)) and not all(map(torch.equal, other, same))
    assert all(map(torch.equal, kept(5 - 2**40), same))
