"""Methods that do not come with the package: registered classes, and entry points of installed packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

import llm_accel
from llm_accel import ConfigError, SnapKV, UnknownMethodError, list_methods, register_method
from llm_accel.method_table import describe, markdown, text
from llm_accel.methods import AttentionMethod, MethodInfo, PromptCompression, catalog
from llm_accel.registry import parse, parse_all
from llm_accel.serve.settings import ServeSettings
from tests.pages import ROOT, tutorial_method
from tests.third_party import KEY_NORM, install
from tests.tiny import prompt, tiny_model

KeyNorm = tutorial_method()
INFO = MethodInfo("none", "nothing", needs_query=False, frees_memory=False)


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers or installs is gone after it."""
    monkeypatch.setattr(catalog, "_registered", dict(catalog._registered))
    yield
    catalog._declared.cache_clear()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory on the path for packages."""
    monkeypatch.syspath_prepend(str(tmp_path))
    catalog._declared.cache_clear()
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


# --- registered classes ----------------------------------------------------------------------------------------------


def test_a_registered_class_has_a_name_everywhere() -> None:
    with pytest.raises(UnknownMethodError):
        parse("key_norm:budget=24")
    assert register_method(KeyNorm) is KeyNorm
    assert parse("key_norm:budget=24") == KeyNorm(budget=24) and list_methods()["key_norm"] is KeyNorm
    assert parse_all("flowcut+key_norm:budget=24")[1] == KeyNorm(budget=24)
    assert "key_norm" in ServeSettings(allow_methods="key_norm").allowed()
    with llm_accel.apply(tiny_model("llama"), "key_norm", budget=24) as handle:
        assert handle.config == KeyNorm(budget=24)
    assert "key_norm" in describe(list_methods()) and "key_norm" not in markdown()


def test_a_class_registered_twice_replaces_itself_and_no_other() -> None:
    again = tutorial_method()
    register_method(KeyNorm)
    assert register_method(again) is again is list_methods()["key_norm"]

    @dataclass(frozen=True)
    class Mine(KeyNorm):  # type: ignore[misc, valid-type]
        name: ClassVar[str] = "snapkv"

    with pytest.raises(ConfigError, match=r"Mine has the name 'snapkv' of llm_accel.methods.kv.snapkv:SnapKV"):
        register_method(Mine)
    assert list_methods()["snapkv"] is SnapKV


def _class(base: type, **members: Any) -> type:
    return dataclass(frozen=True)(type("Mine", (base,), members))


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (int, "is no method; give a class derived from a role"),
        (KeyNorm(budget=24), "is no method"),
        (_class(PromptCompression, info=INFO), "name=None is not allowed"),
        (_class(PromptCompression, info=INFO, name="Key Norm"), "name='Key Norm' is not allowed; give lower-case"),
        (_class(PromptCompression, name="mine"), "Mine has no `info`"),
        (type("Mine", (KeyNorm,), {"name": "mine"}), r"decorate it with @dataclass\(frozen=True\)"),
        (_class(KeyNorm, name="mine", __annotations__={"size": int}, size=3), r"size must be declared as option\("),
        (_class(AttentionMethod, name="mine", info=INFO), "does not define attend, remember"),
    ],
    ids=str,
)
def test_what_is_no_method_is_refused(cls: Any, words: str) -> None:
    before = dict(list_methods())
    with pytest.raises(ConfigError, match=words):
        register_method(cls)
    assert dict(list_methods()) == before


# --- entry points ----------------------------------------------------------------------------------------------------


def test_a_package_is_imported_when_its_method_is_asked_for(site: Path) -> None:
    install(site, "key_norm_package", key_norm="KeyNorm")
    assert "key_norm" in list_methods() and list(list_methods())[-1] == "key_norm"
    assert parse("snapkv:budget=64") == SnapKV(budget=64)
    with pytest.raises(UnknownMethodError, match="Did you mean 'key_norm'"):
        parse("key_nrom")
    assert "key_norm_package" not in sys.modules
    model, ids = tiny_model("llama"), prompt(40)
    with llm_accel.apply(model, "key_norm", budget=24) as handle:
        model.generate(ids, max_new_tokens=2, do_sample=False)
        assert all(layer.evicted == 16 for layer in handle.report().layers)
    assert len(list_methods()) == len(list(list_methods())) == len(catalog.list_methods())


def test_a_package_may_register_what_it_declares(site: Path) -> None:
    code = KEY_NORM.replace("@dataclass", "@llm_accel.register_method\n@dataclass")
    install(site, "registering", "import llm_accel\n" + code, key_norm="KeyNorm")
    assert list_methods()["key_norm"] is sys.modules["registering"].KeyNorm


@pytest.mark.parametrize(
    ("code", "value", "words"),
    [
        ("import no_such_module", "KeyNorm", r"cannot be imported: ModuleNotFoundError: No module named 'no_such_mod"),
        ("raise RuntimeError('no luck')", "KeyNorm", r"cannot be imported: RuntimeError: no luck; repair or uninstall"),
        (KEY_NORM, "Other", "cannot be imported: AttributeError"),
        ("KeyNorm = 3", "KeyNorm", "cannot be used: 3 is no method"),
        (
            KEY_NORM.replace('"key_norm"', '"norm"'),
            "KeyNorm",
            "calls itself 'norm'; its entry point must",
        ),
    ],
    ids=["import", "raises", "attribute", "no method", "name"],
)
def test_a_broken_package_is_named_and_harms_nothing_else(site: Path, code: str, value: str, words: str) -> None:
    install(site, "broken", code, key_norm=value)
    for _ in range(2):
        with pytest.raises(ConfigError, match=rf"'key_norm' of the package broken 1.2 \(broken:{value}\) {words}"):
            parse("key_norm:budget=24")
    assert parse("snapkv:budget=64") == SnapKV(budget=64)
    table = describe(list_methods())
    assert "broken 1.2" in table["key_norm"]["error"] and "not usable: method 'key_norm'" in text(table)


def test_two_packages_with_one_name_are_refused(site: Path) -> None:
    install(site, "one", key_norm="KeyNorm")
    install(site, "two", key_norm="KeyNorm")
    with pytest.raises(ConfigError, match=r"'key_norm' is defined by .*one 1.2 \(one:KeyNorm\).*two:KeyNorm.*unin"):
        parse("key_norm")
    assert not {"one", "two"} & set(sys.modules)


def test_a_package_cannot_take_a_name_of_ours(site: Path) -> None:
    install(site, "thief", KEY_NORM.replace('"key_norm"', '"snapkv"'), snapkv="KeyNorm")
    with pytest.raises(ConfigError, match=r"'snapkv' is defined by llm_accel \(.*:SnapKV\) and thief 1.2 \(thief:Key"):
        parse("snapkv:budget=64")
    assert parse("random:budget=64") is not None


def test_the_command_line_takes_a_method_of_a_package(tmp_path: Path) -> None:
    """As a user would: nothing but the package on the path."""
    install(tmp_path, "key_norm_package", key_norm="KeyNorm")
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    sizes = ["--lengths", "192", "--depths", "1", "--samples", "1", "--no-plot", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "llm_accel", "needle", "--method", "key_norm:budget=64", *sizes],
        env=os.environ | {"PYTHONPATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert "key_norm:budget=64" in json.dumps(summary)
