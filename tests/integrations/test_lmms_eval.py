"""The adapter of lmms-eval on a stand-in for it: its registry, and a wrapper that swallows errors as its own do."""

from __future__ import annotations

import importlib
import sys
import tomllib
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from llm_accel import ConfigError, UnknownMethodError
from llm_accel.integrations import lmms_eval_models
from tests.tiny import tiny_model

ROOT = Path(__file__).resolve().parents[2]


class Wrapper:
    """Like lmms-eval's: refuses arguments it does not know, and answers with nothing where generate fails."""

    is_simple = False

    def __init__(self, pretrained: str = "tiny", **kwargs) -> None:
        assert kwargs == {}, f"Unexpected kwargs: {kwargs}"
        self.model = tiny_model("llama")

    def generate_until(self, requests):
        answers = []
        for ids in requests:
            try:
                answers.append(self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False).tolist())  # fmt: skip # noqa: E501
            except Exception:
                answers.append("")
        return answers


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None


@pytest.fixture
def harness(monkeypatch):
    """Our class over the stand-in wrapper."""
    for name, content in (("registry_v2", ModelManifest), ("chat.llava_hf", Wrapper)):
        module = types.ModuleType(f"lmms_eval.models.{name}")
        setattr(module, "LlavaHf" if content is Wrapper else "ModelManifest", content)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    yield lmms_eval_models
    vars(lmms_eval_models).pop("LlavaHf", None)


def test_the_entry_point_names_classes_that_exist(harness):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"]["lmms_eval.models"]["llm_accel"].partition(":")
    found = {m.model_id: m.chat_class_path for m in getattr(importlib.import_module(module), function)()}
    assert list(found) == ["llm_accel_internvl_hf", "llm_accel_llava_hf", "llm_accel_qwen2_5_vl", "llm_accel_qwen3_vl"]
    module, _, name = found["llm_accel_llava_hf"].rpartition(".")
    made = getattr(importlib.import_module(module), name)
    assert issubclass(made, Wrapper) and made.is_simple is False
    assert made is getattr(lmms_eval_models, name)


def test_the_method_is_on_the_model(harness):
    lm = harness.LlavaHf(pretrained="x", method="snapkv:budget=24;window=8")
    assert lm.method == "snapkv:budget=24,window=8"
    ids = torch.arange(5, 69).view(1, 64)
    dense, short = harness.LlavaHf().generate_until([ids]), lm.generate_until([ids])
    assert len(dense[0][0]) == len(short[0][0]) == 67
    assert lm.handle.report().layers[0].physical_length < 30
    with pytest.raises(UnknownMethodError):
        harness.LlavaHf(method="nothing")
    with pytest.raises(ConfigError):
        harness.LlavaHf(method="snapkv:budget=0")


@pytest.mark.parametrize("method", ["dense", "snapkv:budget=24;window=8"])
def test_a_swallowed_error_ends_the_run_or_is_counted(harness, method, caplog):
    good, bad = torch.arange(5, 69).view(1, 64), torch.full((1, 64), 10**6)
    strict = harness.LlavaHf(method=method)
    with pytest.raises(IndexError):
        strict.generate_until([good, bad, good])
    assert strict.failures == 1 and strict.generate_until([good])[0] != ""
    loose = harness.LlavaHf(method=method, strict="False")
    assert [answer == "" for answer in loose.generate_until([good, bad, good])] == [False, True, False]
    assert "1 of 3 answers are missing" in caplog.text
