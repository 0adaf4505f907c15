"""``llm-accel heads`` on the bundled model, and what its profile is good for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import llm_accel
from llm_accel import ConfigError, RetrievalHeads
from llm_accel.cli import main
from llm_accel.common.bundled import load_needle_model
from llm_accel.methods import load_profile
from tests.tiny import prompt, tiny_model

QUICK = ["--detector", "copy_paste", "--lengths", "256", "--depths", "0,100", "--samples", "1", "--no-circuit"]


def heads(capsys: pytest.CaptureFixture[str], out: Path, *args: str) -> dict[str, Any]:
    assert main(["heads", "--out", str(out), *args]) == 0
    summary: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return summary


def test_data_free_profile(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    summary = heads(capsys, tmp_path, "--tokens", "32", "--samples", "1")
    profile = load_profile(tmp_path)
    assert profile.method == summary["detector"] == "induction"
    assert profile.shape == (summary["layers"], summary["query_heads"], summary["kv_heads"])
    assert profile.echo_scores and profile.circuit is None
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")
    model, _ = load_needle_model()
    with llm_accel.apply(model, "retrieval_heads", heads=str(tmp_path / "heads.json")) as handle:
        assert handle.report().backends["heads"] == ("induction profile", "measured on these weights")


def test_copy_paste_goes_on_where_it_stopped(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    first = heads(capsys, tmp_path, *QUICK)
    lines = (tmp_path / "cells.jsonl").read_text().splitlines()
    assert len(lines) == 2
    (tmp_path / "cells.jsonl").write_text(lines[0] + "\n")
    assert heads(capsys, tmp_path, *QUICK) == first
    assert (tmp_path / "cells.jsonl").read_text().splitlines() == lines
    assert main(["heads", "--out", str(tmp_path), *QUICK, "--seed", "5"]) == 2
    assert "other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["--detector", "echo"], "unknown value 'echo'"),
        (["--lengths", "256"], "--lengths belongs to --detector copy_paste"),
        (["--detector", "copy_paste", "--tokens", "8"], "--tokens belongs to --detector induction"),
        (["--samples", "0"], "at least 1"),
    ],
)
def test_arguments_that_cannot_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, args: list[str], part: str
) -> None:
    assert main(["heads", "--out", str(tmp_path / "new"), *args]) == 2
    assert part in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_bundled_model_has_a_profile_of_its_own_weights() -> None:
    model, _ = load_needle_model(torch.bfloat16)
    with llm_accel.apply(model, "retrieval_heads") as handle:
        assert handle.report().backends["heads"][1] == "measured on these weights"


def test_other_models_need_a_profile_of_their_own(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="llm-accel heads --model"):
        llm_accel.apply(model, RetrievalHeads())
    bundled, _ = load_needle_model()
    counts = bundled.config.num_hidden_layers, bundled.config.num_attention_heads
    with pytest.raises(ConfigError, match=f"has {counts[0]} layers, {counts[1]} query heads"):
        llm_accel.apply(model, "retrieval_heads", heads=str(Path(llm_accel.__file__).parent / "assets/needle"))


@torch.no_grad()
def test_profiles_of_other_weights_are_used_and_named(tmp_path: Path) -> None:
    model, ids = tiny_model("llama"), prompt(40)
    rows = [[0.1, 0.2, 0.3, 0.4]] * 3
    data = {"model": "twin", "method": "copy_paste", "q_head_scores": rows, "kv_head_scores": [[0.2, 0.4]] * 3}
    (tmp_path / "heads.json").write_text(json.dumps(data | {"weights_hash": "0"}))
    with llm_accel.apply(model, RetrievalHeads(heads=str(tmp_path), full=0.5, sinks=2, recent=8)) as handle:
        model.generate(ids, max_new_tokens=1)
        report = handle.report()
    assert report.backends["heads"] == ("copy_paste profile", "measured on other weights than these (twin)")
    assert [layer.kv_bytes for layer in report.layers] == [(40 + 10) * 2 * 16 * 4] * 3
