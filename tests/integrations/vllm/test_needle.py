"""``llm-accel needle --engine vllm``: the records of an engine beside those of transformers."""

from __future__ import annotations

import importlib.util
import json

import pytest
from transformers import AutoConfig

from llm_accel.cli import main
from llm_accel.common.bundled import needle_model_path
from llm_accel.integrations.vllm.blocks import policy_of

GRID = ("--lengths", "512,768", "--depths", "3", "--no-plot", "--json-only")
INSTALLED = importlib.util.find_spec("vllm") is not None


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--engine", "vllm", "--query-agnostic"], "a request comes with its question"),
        (["--engine", "vllm", "--attn", "eager"], "--attn eager is not for --engine vllm"),
        (["--engine", "vllm", "--device", "mps"], "--device mps is not for --engine vllm"),
        (["--block-size", "16"], "give --engine vllm"),
        (["--engine", "sglang"], "engine"),
    ],
)
def test_what_does_not_fit_the_engine_is_refused(more, reason, capsys, tmp_path):
    assert main(["needle", *GRID, "--out", str(tmp_path), *more]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.skipif(INSTALLED, reason="vllm is installed")
def test_without_vllm_the_engine_says_how_to_get_it(capsys, tmp_path):
    assert main(["needle", *GRID, "--out", str(tmp_path), "--engine", "vllm"]) == 2
    assert "pip install 'llm_accel[vllm]'" in capsys.readouterr().err


@pytest.mark.vllm
@pytest.mark.skipif(not INSTALLED, reason="vllm is not installed")
def test_methods_that_vllm_cannot_run_are_refused_before_any_engine_starts(capsys, tmp_path):
    for method, reason in (("adakv", "one block table serves all heads"), ("snapkv:budget=70", "at least 161")):
        more = ["--engine", "vllm", "--block-size", "128", "--method", "dense", "--method", method]
        assert main(["needle", *GRID, "--out", str(tmp_path), *more]) == 2
        assert reason in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.vllm
@pytest.mark.skipif(not INSTALLED, reason="vllm is not installed")
def test_an_engine_answers_as_transformers_and_holds_what_the_arithmetic_says(capfd, tmp_path):
    """The bundled model finds every needle with a quarter of the cache, in both."""
    method, found = "snapkv:ratio=0.25", {}
    for engine, more in (("vllm", ["--block-size", "32", "--batch-size", "6"]), ("transformers", [])):
        out = tmp_path / engine
        methods = ["--method", "dense", "--method", method]
        assert main(["needle", *GRID, *methods, "--out", str(out), "--engine", engine, *more]) == 0
        records = [json.loads(line) for line in (out / "cells.jsonl").read_text().splitlines()]
        found[engine] = {(one["method"], one["length"], one["depth"]): one for one in records}
        summary = json.loads(capfd.readouterr().out.splitlines()[-1])
        assert summary["complete"] and summary["methods"][method]["exact"] == summary["methods"]["dense"]["exact"] == 1
    ours, theirs = found["vllm"], found["transformers"]
    assert {key: one["answer"] for key, one in ours.items()} == {key: one["answer"] for key, one in theirs.items()}
    assert {key: one["prompt_hash"] for key, one in ours.items()} == {k: o["prompt_hash"] for k, o in theirs.items()}
    config = AutoConfig.from_pretrained(needle_model_path())
    page = 32 * config.num_hidden_layers * config.num_key_value_heads * 2 * config.head_dim * 4
    for (name, length, _), one in ours.items():
        first, last = policy_of(method, 32).gap(length, length) if name == method else (0, 0)
        assert one["dense_kv_bytes"] - one["kv_bytes"] == (last - first) * page
        stored = length + one["new_tokens"]  # and perhaps an end token
        assert one["dense_kv_bytes"] in (-(-stored // 32) * page, -(-(stored - 1) // 32) * page)
        assert one["prefill_ms"] is None and one["decode_ms_per_token"] is None
    settings = json.loads((tmp_path / "vllm" / "run.json").read_text())["settings"]
    assert settings["engine"] == "vllm" and settings["block_size"] == 32 and settings["weights_hash"]
