"""The command line: what it prints where, and its exit codes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import types

import pytest

from llm_accel import ConfigError, __version__, cli, list_methods
from llm_accel.common import bundled


def in_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "llm_accel", *arguments], capture_output=True, text=True, timeout=120)


def fake_command(monkeypatch: pytest.MonkeyPatch, run) -> None:
    """``llm-accel fake`` with this ``run``."""
    module = types.ModuleType("fake_command")
    module.add_arguments = lambda parser: parser.add_argument("--out")
    module.run = run
    monkeypatch.setitem(sys.modules, "fake_command", module)
    monkeypatch.setitem(cli.COMMANDS, "fake", cli.Command("fake_command", "for tests"))


# --- overview --------------------------------------------------------------------------------------------------------


def test_module_and_help_load_neither_torch_nor_transformers():
    code = (
        "import sys, llm_accel.cli\n"
        "assert llm_accel.cli.main([]) == 0\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in cli.COMMANDS)


def test_python_dash_m_and_help():
    done = in_process("--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: llm-accel COMMAND") and done.stderr == ""


def test_version(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out == f"llm_accel {__version__}\n"


@pytest.mark.parametrize("arguments", [["nedle"], ["Needle", "--out", "x"]])
def test_unknown_command_shows_the_nearest_name(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    assert cli.main(arguments) == cli.USAGE_ERROR == 2
    output = capsys.readouterr()
    assert output.out == "" and "Did you mean 'needle'?" in output.err


def test_unknown_option_shows_the_nearest_name(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["doctor", "--jsn"]) == 2
    assert "Did you mean '--json'?" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: llm-accel {name}")


# --- errors ----------------------------------------------------------------------------------------------------------


def test_errors_of_the_package_go_to_stderr_with_exit_code_2(monkeypatch, capsys):
    def run(args):
        raise ConfigError("what was given and what is allowed")

    fake_command(monkeypatch, run)
    assert cli.main(["fake"]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err == "llm-accel: what was given and what is allowed\n"


def test_errors_of_others_are_not_hidden(monkeypatch):
    def run(args):
        raise ZeroDivisionError

    fake_command(monkeypatch, run)
    with pytest.raises(ZeroDivisionError):
        cli.main(["fake"])


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(monkeypatch, capsys):
    def run(args):
        raise KeyboardInterrupt

    fake_command(monkeypatch, run)
    assert cli.main(["fake", "--out", "somewhere"]) == cli.INTERRUPTED == 130
    output = capsys.readouterr()
    assert output.out == "" and "same --out" in output.err and "Traceback" not in output.err


def test_a_closed_pipe_is_no_traceback():
    done = subprocess.run(
        f"{sys.executable} -m llm_accel methods | true", shell=True, capture_output=True, text=True, timeout=120
    )
    assert "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("snapvk:budget=64", "Did you mean 'snapkv'?"),
        ("snapkv:budgt=64", "Did you mean 'budget'?"),
        ("snapkv:budget=64,ratio=0.5", "give one of them"),
        ("snapkv:budget=0", "budget=0"),
        ("snapkv:kernel=4", "odd"),
        ("snapkv:ratio=nan", "finite"),
    ],
)
def test_bad_methods_are_explained(spec: str, part: str, tmp_path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "run"
    assert cli.main(["needle", "--out", str(out), "--method", "dense", "--method", spec]) == 2
    output = capsys.readouterr()
    assert part in output.err and output.out == "" and not out.exists()


@pytest.mark.parametrize("damage", ["no folder", "no weights", "cut weights"])
@pytest.mark.parametrize("command", ["needle", "heads"])
def test_missing_weights_of_the_bundled_model_are_explained(
    command: str, damage: str, tmp_path, monkeypatch, capsys: pytest.CaptureFixture[str]
):
    broken = tmp_path / "model"
    if damage != "no folder":
        shutil.copytree(bundled.needle_model_path(), broken)
        weights = broken / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000] if damage == "cut weights" else b"")
        if damage == "no weights":
            weights.unlink()
    monkeypatch.setattr(bundled, "needle_model_path", lambda: broken)
    assert cli.main([command, "--out", str(tmp_path / "out")]) == 2
    output = capsys.readouterr()
    assert f"bundled needle model cannot be loaded from {broken}" in output.err and "Reinstall" in output.err
    assert "Traceback" not in output.err and output.out == "" and not (tmp_path / "out").exists()


# --- methods and doctor ----------------------------------------------------------------------------------------------


def test_methods_prints_the_table_and_every_option(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["methods"]) == 0
    output = capsys.readouterr()
    for name, config in list_methods().items():
        assert name in output.out and config.info.paper in output.out
    assert "observation window" in output.out and output.err == ""


def test_methods_as_json(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["methods", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert list(data) == list(list_methods())
    snapkv = data["snapkv"]
    assert snapkv["class"] == "SnapKV" and snapkv["needs_query"] and snapkv["frees_memory"]
    assert snapkv["options"]["window"] == {"default": 32, "help": snapkv["options"]["window"]["help"]}


def test_doctor_as_text(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for part in ("llm_accel", "python", "torch", "transformers", "gpu", "sdpa", "column_votes", "bundled models"):
        assert part in text, text


def test_doctor_as_json(capsys: pytest.CaptureFixture[str]):
    import torch
    import transformers

    assert cli.main(["doctor", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["packages"]["torch"] == torch.__version__
    assert data["packages"]["transformers"] == transformers.__version__
    assert data["transformers_window"]["inside"] in (True, None)
    assert bool(data["gpus"]["devices"]) == torch.cuda.is_available() != bool(data["gpus"]["why_none"])
    for entry in (*data["backends"].values(), *data["kernels"].values()):
        assert entry["reason"]
    assert all(entry["present"] for entry in data["bundled_models"].values()) and "vision" in data["bundled_models"]
