"""lm-evaluation-harness gives the answers that our own runs give, through both routes; skipped where it is missing."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from llm_accel import ConfigError
from llm_accel.cli import main
from llm_accel.integrations.lm_eval_command import TASKS, harness_arguments

METHOD = "snapkv:budget=96,window=16"
needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")


def test_the_harness_gets_its_own_options_and_the_method():
    ours = ["--include_path", str(TASKS), "--model_args", json.dumps({"method": METHOD})]
    begin = ["run", "--model", "llm_accel"]
    assert harness_arguments(["--tasks", "x"], METHOD) == [*begin, "--tasks", "x", *ours]
    assert harness_arguments(["run", "--tasks=x", "--include_path=d"], METHOD) == [*begin, "--tasks=x", "--include_path=d", *ours[2:]]  # fmt: skip # noqa: E501
    assert harness_arguments(["ls", "tasks"], METHOD) == ["ls", "tasks", *ours[:2]]
    with pytest.raises(ConfigError, match="pretrained=ID"):
        harness_arguments(["--model", "hf"], METHOD)


def test_wrong_methods_and_a_missing_harness_are_explained(monkeypatch, capsys):
    assert main(["lm-eval", "--method", "snapvk", "--tasks", "x"]) == 2
    assert "Did you mean 'snapkv'?" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["lm-eval", "--tasks", "x"]) == 2
    assert "pip install 'llm_accel[lm-eval]'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """Samples of two tasks, and the records of our own run of them."""
    folder = tmp_path_factory.mktemp("ruler")
    common = ["ruler", "--tasks", "niah_single_2,niah_multiquery", "--samples", "2", "--lengths", "600"]
    assert main([*common, "--write-samples", str(folder / "samples.jsonl")]) == 0
    assert main([*common, "--method", METHOD, "--no-plot", "--out", str(folder / "run")]) == 0
    lines = (folder / "run" / "cells.jsonl").read_text().splitlines()
    records = {(r["task"], r["sample"]): r for r in map(json.loads, lines)}
    return str(folder / "samples.jsonl"), records


def same(samples: list[dict], records: dict) -> bool:
    """Whether the harness's answers and scores are ours, sample for sample."""
    theirs = {(s["doc"]["task"], s["doc"]["index"]): (s["filtered_resps"][0], s["score"]) for s in samples}
    return theirs == {place: (record["answer"], record["score"]) for place, record in records.items()}


@needs_lm_eval
def test_the_command_gives_our_answers(ours, tmp_path):
    file, records = ours
    metadata = json.dumps({"samples": file})
    main(["lm-eval", "--method", METHOD, "--tasks", "llm_accel_ruler_niah", "--device", "cpu", "--metadata", metadata,
          "--output_path", str(tmp_path), "--log_samples"])  # fmt: skip
    (results,) = (json.loads(path.read_text()) for path in Path(tmp_path).rglob("results_*.json"))
    (log,) = Path(tmp_path).rglob("samples_*.jsonl")
    assert same([json.loads(line) for line in log.read_text().splitlines()], records)
    assert results["config"]["llm_accel_method"] == METHOD and results["config"]["model_args"]["method"] == METHOD
    assert 0 < results["config"]["llm_accel_kv_of_dense"] < 0.5


@needs_lm_eval
def test_a_patched_object_gives_our_answers(ours):
    from examples.lm_eval_object import evaluate
    from llm_accel.common.bundled import load_needle_model

    file, records = ours
    model, tokenizer = load_needle_model()
    results = evaluate(model, tokenizer, METHOD, ["llm_accel_ruler_niah"], {"samples": file})
    assert same(results["samples"]["llm_accel_ruler_niah"], records)
    assert "generate" not in vars(model)


@needs_lm_eval
def test_loglikelihoods_are_the_dense_models_and_say_so(caplog):
    from lm_eval.api.instance import Instance

    from llm_accel.integrations.lm_eval_model import LlmAccelLM

    context = "The dog watched the old river. " * 30
    requests = [Instance("loglikelihood", {}, (context, end), 0) for end in ("The cat", "The horse")]
    found = {}
    for method in ("dense", "snapkv:budget=64"):
        found[method] = LlmAccelLM(method=method, device="cpu").loglikelihood(requests, disable_tqdm=True)
    assert found["dense"] == found["snapkv:budget=64"]
    assert caplog.text.count("these scores are those of the dense model") == 1
