"""``llm-accel vllm`` and what doctor says of vLLM. Needs no vLLM."""

from __future__ import annotations

import importlib.util
import json
import os
import sys

import pytest

from llm_accel import ConfigError, doctor
from llm_accel.cli import main
from llm_accel.integrations.vllm.command import check_plugins, server_arguments
from llm_accel.integrations.vllm.compat import Interface

METHOD = "snapkv:budget=2048"


def overrides(arguments):
    return json.loads(arguments[arguments.index("--hf-overrides") + 1])


def test_the_server_gets_its_own_options_and_our_key():
    given = server_arguments("some/model", METHOD, ["--port", "8001", "--enforce-eager"])
    assert given[:5] == ["--model", "some/model", "--port", "8001", "--enforce-eager"]
    assert overrides(given) == {"llm_accel": {"method": METHOD}}
    assert "--hf-overrides" not in server_arguments("m", "dense", [])


@pytest.mark.parametrize("form", [["--hf-overrides", '{"a": 1}'], ['--hf_overrides={"a": 1}']])
def test_overrides_of_the_user_stay(form):
    given = server_arguments("m", METHOD, [*form, "--port", "1"])
    assert overrides(given) == {"a": 1, "llm_accel": {"method": METHOD}}
    assert given[:4] == ["--model", "m", "--port", "1"]
    with pytest.raises(ConfigError, match="by --method alone"):
        server_arguments("m", METHOD, ["--hf-overrides", '{"llm_accel": {}}'])
    with pytest.raises(ConfigError, match="give a JSON object"):
        server_arguments("m", METHOD, ["--hf-overrides", "[1]"])


def test_an_environment_without_our_plug_in_is_refused():
    check_plugins({})
    check_plugins({"VLLM_PLUGINS": "other,llm_accel"})
    with pytest.raises(ConfigError, match="VLLM_PLUGINS='other'"):
        check_plugins({"VLLM_PLUGINS": "other"})


def test_the_command_checks_and_becomes_the_server(monkeypatch, capsys):
    started = []
    monkeypatch.setattr(os, "execv", lambda *given: started.append(given))
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert main(["vllm", "some/model", "--method", "adakv"]) == 2
    assert "one block table serves all heads" in capsys.readouterr().err
    if importlib.util.find_spec("vllm") is None:
        assert main(["vllm", "some/model", "--method", METHOD]) == 2
        assert "pip install 'llm_accel[vllm]'" in capsys.readouterr().err
        return
    assert main(["vllm", "some/model", "--method", METHOD, "--port", "8001"]) == 0
    ((program, arguments),) = started
    assert program == sys.executable and arguments[:3] == [program, "-m", "vllm.entrypoints.openai.api_server"]
    assert overrides(arguments) == {"llm_accel": {"method": METHOD}}


def test_doctor_names_each_feature_that_is_off():
    assert doctor._vllm_lines(None) == [("vllm", "not installed (pip install 'llm_accel[vllm]')")]
    data = {
        "version": "0.40.0",
        "tested": ["0.29", "0.32"],
        "inside": False,
        "features": {"kv": "x is missing", "A": None},
    }
    assert doctor._vllm_lines(data) == [
        ("vllm", "0.40.0, OUTSIDE of the tested range 0.29 to 0.32"),
        ("kv", "off: x is missing"),
        ("A", "on"),
    ]


def test_a_dependency_that_breaks_on_import_is_named(tmp_path, monkeypatch):
    """vLLM imports torchvision, which raises a RuntimeError where it was built for another torch."""
    (tmp_path / "broken_dependency.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    problem = Interface("broken_dependency:anything").problem()
    assert problem == "broken_dependency cannot be imported: operator torchvision::nms does not exist"
