"""``llm-accel plan``: figures worked out by hand, and what real caches hold."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    DeepseekV3Config,
    Gemma3TextConfig,
    PretrainedConfig,
    Qwen3NextConfig,
)

import llm_accel
from llm_accel import UnsupportedModelError, cli
from llm_accel.eval.tasks.plan.arithmetic import estimate
from llm_accel.eval.tasks.plan.model import geometry
from llm_accel.patches.footprint import Load
from llm_accel.patches.install import make_plan
from tests.contracts.matrix import METHODS, generate, make_batch
from tests.tiny import CONFIGS, tiny_model

K = 1024
H100 = 3.35e12


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, dict[str, Any]]:
    """What a command prints before its last line, and that as data."""
    assert cli.main(["plan", *arguments]) == 0
    *table, line = capsys.readouterr().out.splitlines()
    return "\n".join(table), json.loads(line)


def saved(config: PretrainedConfig, folder: Path) -> str:
    config.save_pretrained(folder)
    return str(folder / "config.json")


def test_llama_31_8b_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    methods = ("snapkv:ratio=0.25", "adakv:ratio=0.25", "streaming_llm:budget=2048", "h2o:budget=2048", "hip")
    given = [word for method in methods for word in ("--method", method)]
    table, data = planned(
        capsys, "--model", "llama-3.1-8b", "--context", "128k", "--batch", "8", "--memory", "80GB", *given
    )
    token, new, weights = 32 * 2 * 8 * 128 * 2, 255, 2 * 8030261248
    model, found = data["model"], data["methods"]
    assert (model["weight_bytes"], model["kv_bytes_per_token"]) == (weights, token)
    assert model["step_weight_bytes"] == weights - 2 * 128256 * 4096  # rows of the embedding are looked up
    assert found["dense"]["kv_bytes"] == 8 * token * (128 * K + new)
    assert found["snapkv:ratio=0.25"]["kv_bytes"] == 8 * token * (32 * K + new)
    pages = -(-8 * (32 * K + 63) // 64) + 8 * 4  # of 8 heads, in each of 32 layers
    assert found["adakv:ratio=0.25"]["kv_bytes"] == 8 * 32 * pages * 64 * (2 * 128 * 2)
    assert found["streaming_llm:budget=2048"]["kv_bytes"] == 8 * token * 2048
    assert found["h2o:budget=2048"]["kv_bytes"] == 8 * token * 2049  # the new token joins a full budget
    assert found["hip"]["kv_bytes"] == found["dense"]["kv_bytes"]
    seen = 28 * (256 + 1024 + 2048) + 4 * (256 + 1024 + 4096)  # four edge layers have twice the budget
    assert found["hip"]["read_bytes"] == 8 * seen * token // 32
    dense = found["dense"]
    assert dense["step_ms"] == pytest.approx(1e3 * (model["step_weight_bytes"] + dense["kv_bytes"]) / H100)
    rows = (80 * 10**9 - weights) // (token * (128 * K + new))
    assert dense["largest_batch"]["kv_only"] == rows == 3
    act = model["activation_bytes_per_token"]
    assert dense["prefill_peak"] == weights + 8 * 128 * K * (token + act)
    kept = 32 * K * token + 96 * K * token // 32  # every layer but the one that is being cut holds its budget
    assert found["snapkv:ratio=0.25"]["prefill_peak"] == weights + 8 * (kept + 128 * K * act)
    assert "128.25 GiB" in table and "h100, assumed (3350 GB/s)" in table and "estimates" in table


def test_break_even_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--method", "snapkv:budget=2048", "--method", "snapkv:ratio=1.0", "--new-tokens", "101")
    _, data = planned(capsys, "--model", "llama-3.1-8b", *given)
    # 100 steps each read n + 100 instead of 2148 entries; choosing reads n and copies 2048
    least = next(n for n in range(2049, 4096) if 100 * (n - 2048) > n + 2 * 2048)
    assert data["methods"]["snapkv:budget=2048"]["break_even"] == pytest.approx(least, abs=2)
    assert data["methods"]["snapkv:ratio=1.0"]["break_even"] is None


def test_gemma_3_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Gemma3TextConfig(num_hidden_layers=12, sliding_window=512, num_key_value_heads=1, head_dim=256)
    path = saved(config, tmp_path)
    _, data = planned(capsys, "--model", path, "--context", "32k", "--method", "snapkv:ratio=0.25", "--gpu", "l4")
    entry, new = 2 * 256 * 2, 255
    assert (data["model"]["full_layers"], data["model"]["sliding_layers"]) == (2, 10)
    assert data["methods"]["dense"]["kv_bytes"] == entry * (2 * (32 * K + new) + 10 * 511)
    assert data["methods"]["snapkv:ratio=0.25"]["kv_bytes"] == entry * (2 * (8 * K + new) + 10 * 511)
    assert data["bandwidth"] == {"name": "l4", "bytes_per_s": 0.3e12}


def test_latents_of_deepseek_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(DeepseekV3Config(num_hidden_layers=4, first_k_dense_replace=1), tmp_path)
    _, data = planned(capsys, "--model", path, "--batch", "2", "--method", "snapkv:ratio=0.25")
    assert data["model"]["kv_bytes_per_token"] == 4 * (512 + 64) * 2  # latent and rotary key
    assert data["methods"]["snapkv:ratio=0.25"]["kv_bytes"] == 2 * 4 * 1152 * (8 * K + 255)
    experts = 3 * 256 * 3 * 7168 * 2048 * 2
    unread = 2 * 129280 * 7168 + experts * (256 - 2 * 8) // 256  # two rows choose 8 of 256 experts each
    assert data["model"]["step_weight_bytes"] == data["model"]["weight_bytes"] - unread


def test_states_of_qwen3_next_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Qwen3NextConfig(num_hidden_layers=8, num_experts=8, num_experts_per_tok=2)
    path = saved(config, tmp_path)
    _, data = planned(capsys, "--model", path, "--context", "16k", "--method", "snapkv:budget=2048")
    channels = 2 * 16 * 128 + 32 * 128
    states = 6 * (channels * 4 * 2 + 32 * 128 * 128 * 4)  # six linear layers; the recurrent state is fp32
    assert data["model"]["full_layers"] == 2 and data["model"]["state_bytes"] == states
    entry = 2 * 2 * 256 * 2
    held = states + 2 * entry * (2048 + 255)
    assert data["methods"]["snapkv:budget=2048"]["kv_bytes"] == held


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek_v3", "qwen3_moe"])
def test_real_caches_hold_what_was_planned(family: str) -> None:
    model, batch = tiny_model(family), make_batch("single", long=True)
    shape = geometry(CONFIGS[family](), "float32")
    load = Load(batch.ids.shape[1], 6)
    heads = llm_accel.RetrievalHeads(full=0.0, sinks=3, recent=12)
    if family == "deepseek_v3":
        with pytest.raises(UnsupportedModelError, match="one latent for all heads"):
            make_plan(shape.model, [heads], trace=False, strict=False)
    more = [llm_accel.Dense(), llm_accel.HiP(), *([] if family == "deepseek_v3" else [heads])]
    for config in (*(make() for make in METHODS.values()), *more):
        with llm_accel.apply(model, config) as handle:
            generate(model, batch)
            held = handle.report().kv_bytes
        plan = make_plan(shape.model, [config], trace=False, strict=False)
        found = estimate(shape, plan, load, 1, None, H100).kv_bytes
        paged = plan.kv_method is not None and plan.kv_method.page_size is not None
        assert held <= found <= 1.5 * held if paged else held == found, config.spec()


def test_auto_is_told_what_is_planned_for(capsys: pytest.CaptureFixture[str]) -> None:
    table, data = planned(capsys, "--model", "llama-3.1-8b", "--context", "128k", "--memory", "80GB", "--batch", "16")
    left = int(0.9 * (80 * 10**9 - 2 * 8030261248)) // 16 // 131072
    assert f"auto: snapkv:budget={left}: " in table and "what memory holds" in data["methods"]["auto"]["chosen"]
    _, data = planned(capsys, "--question", "later")
    assert "snapkv:ratio=0.25" not in data["methods"] and "streaming_llm:ratio=0.25" in data["methods"]


def test_what_apply_would_refuse_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Gemma3TextConfig(num_hidden_layers=5, sliding_window=512, layer_types=["sliding_attention"] * 5)
    table, data = planned(capsys, "--model", saved(config, tmp_path), "--method", "snapkv")
    assert "there is nothing to compress" in data["methods"]["snapkv"]["refused"] and "snapkv: gemma3_text" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "llama-3.1-9b"), "has no configuration.*or one of small, llama-3.1-8b"),
        (("--model", "/no/such/config.json"), "has no configuration"),
        (("--context", "128x"), "--context: '128x' is not a length"),
        (("--batch", "0"), "--batch 0: give an integer of at least 1"),
        (("--memory", "much"), "--memory 'much' is not a size; give for example 80GiB"),
        (("--bandwidth", "fast"), "--bandwidth 'fast' is not a size"),
        (("--gpu", "h10"), "Did you mean 'h100'"),
        (("--gpu", "h100", "--bandwidth", "2TB/s"), "give either --gpu or --bandwidth"),
        (("--question", "after"), "--question: unknown value 'after'"),
        (("--method", "snapvk"), "Did you mean 'snapkv'"),
        (("--method", "flowcut"), "acts on visual tokens"),
    ],
)
def test_arguments_that_cannot_work(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", *arguments]) == cli.USAGE_ERROR
    output = capsys.readouterr()
    assert output.out == "" and re.search(message, output.err), output.err
