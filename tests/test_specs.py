"""The text form of methods, for all of them: what is written can be read back, and nonsense gets an explanation."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from llm_accel import list_methods
from llm_accel.errors import ConfigError, LlmAccelError
from llm_accel.methods import BUILT_IN, Dense, MethodConfig, SnapKV
from llm_accel.registry import parse, parse_all, spec_of

_TEXTS = st.text("abcXYZ019._-/ é", min_size=1).filter(lambda text: text == text.strip() and text.lower() != "none")
_KINDS = [kind for kind in BUILT_IN if kind is not Dense]  # whose text form stands for no method
_ANY = "abz_ 019+-.,:=/é\n\t\x00日"
_PIECES = ("+", ":", ",", "=", " ", "none", "true", "0", "-1", "1e999", "64", "0.5", "1+2", "dense", "\x00", "é", "'")


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values of an option with this type, most of them small enough to be allowed."""
    if hint is bool:
        return st.booleans()
    if hint is int:
        return st.integers(0, 80) | st.integers()
    if hint is float:
        return st.floats(0, 1) | st.floats(allow_nan=False, allow_infinity=False)
    if hint is str:
        return _TEXTS
    if hint is type(None):
        return st.none()
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return st.one_of(*map(values, arguments))
    if typing.get_origin(hint) is typing.Literal:
        return st.sampled_from(arguments)
    assert typing.get_origin(hint) is tuple, f"a strategy for {hint} is missing"
    if arguments[-1] is Ellipsis:
        return st.lists(values(arguments[0]), max_size=4, unique=True).map(tuple)
    return st.tuples(*map(values, arguments))


@st.composite
def configs(draw: st.DrawFn) -> MethodConfig:
    """A configuration of any method with some options that are not the default."""
    kind = draw(st.sampled_from(_KINDS))
    hints = typing.get_type_hints(kind)
    names = draw(st.lists(st.sampled_from([field.name for field in dataclasses.fields(kind)]), unique=True, max_size=3))
    options = {name: draw(values(hints[name])) for name in names}
    try:
        return kind(**options)
    except ConfigError:
        assume(False)
        raise


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(config=configs())
def test_what_is_written_can_be_read_back(config: MethodConfig) -> None:
    again = parse(config.spec())
    assert again == config and again.spec() == config.spec()
    other = SnapKV(budget=64)
    assert parse_all(spec_of((config, other))) == (config, other)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(_PIECES) | st.sampled_from(list(list_methods())) | st.text(_ANY, max_size=3), max_size=12)
)
def test_nonsense_is_explained(pieces: list[str]) -> None:
    text = "".join(pieces)
    try:
        found = parse_all(text)
    except LlmAccelError as error:
        assert str(error)
    else:
        assert parse_all(spec_of(found)) == found


@settings(max_examples=150, deadline=None)
@given(data=st.data(), kind=st.sampled_from(_KINDS))
def test_nonsense_in_options_is_explained(kind: type[MethodConfig], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([field.name for field in dataclasses.fields(kind)]))
    value = data.draw(st.sampled_from(_PIECES) | st.text(_ANY, max_size=5) | st.integers().map(str))
    try:
        found = parse_all(f"{kind.name}:{name}={value}")
    except LlmAccelError as error:
        assert kind.name in str(error)
    else:
        assert parse_all(spec_of(found)) == found
