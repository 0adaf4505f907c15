"""``llm-accel bench``: what it measures, what it works out, and what it refuses."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_accel import ConfigError, Dense, cli
from llm_accel.eval.cost import ModelCost
from llm_accel.eval.tasks.bench import command
from llm_accel.eval.tasks.bench.bounds import Bounds
from llm_accel.eval.tasks.bench.candidates import CandidateRunner, make_inputs, share_weights
from llm_accel.eval.tasks.bench.compare import check, load, render_comparison
from llm_accel.eval.tasks.bench.memory import TensorBytes, largest_batch
from llm_accel.eval.tasks.bench.runner import largest_fitting
from llm_accel.eval.tasks.bench.settings import BenchSettings, Candidate, parse_batches, parse_bytes
from llm_accel.eval.tasks.bench.shapes import SHAPES, build, shape_config

SIZES = ("hidden_size=32", "intermediate_size=48", "num_hidden_layers=2", "num_attention_heads=4", "vocab_size=64")
TINY = [part for size in SIZES for part in ("--set", size)]
METHOD = "snapkv:budget=8,window=4,kernel=3"
FAST = Bounds(copy=1e9, triad=2e9, flop=1e10)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One small run of the whole command."""
    folder = tmp_path_factory.mktemp("bench")
    arguments = ["bench", *TINY, "--method", METHOD, "--lengths", "24,40", "--new-tokens", "6", "--rounds", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "measure_bounds", lambda device, dtype: FAST)
        assert cli.main([*arguments, "--memory-limit", "192KiB", "--probe", "--out", str(folder)]) == 0
    assert (folder / "bench.png").stat().st_size > 10_000
    return load(folder / "bench.json")


def test_cells_are_measured_and_worked_out(result: dict[str, Any]):
    assert [(cell["name"], cell["length"]) for cell in result["cells"]] == [
        ("dense", 24),
        (METHOD, 24),
        ("dense", 40),
        (METHOD, 40),
    ]
    dense, ours = result["cells"][2:]
    token = 2 * 2 * 2 * 8 * 4  # keys and values, two layers, two heads of eight channels, fp32
    assert dense["kv_bytes"] == dense["dense_kv_bytes"] == token * (40 + 5)
    assert ours["kv_bytes"] == token * (8 + 5) and ours["dense_kv_bytes"] == dense["kv_bytes"]
    assert dense["decode_speedup"] == dense["speedup_bound"] == 1.0
    for cell in (dense, ours):
        assert cell["decode_ms"]["n"] == 2 * (6 - 1 - 2)
        assert 0 < cell["decode_ms"]["q1"] <= cell["decode_ms"]["median"] <= cell["decode_ms"]["q3"]
        assert cell["decode_bound_ms"] == pytest.approx(1e3 * cell["step_bytes"] / FAST.triad)
        assert cell["peak_prefill_bytes"] > result["model"]["weight_bytes"] + cell["kv_bytes"]
        rows = cell["largest_batch"]
        assert 1 <= rows["at_once"] <= rows["one_by_one"] <= rows["kv_only"] and rows["probed"] >= 1
    assert ours["speedup_bound"] == pytest.approx(dense["step_bytes"] / ours["step_bytes"])


def test_the_result_says_what_it_was_measured_on(result: dict[str, Any]):
    assert {"torch", "transformers", "git_commit"} <= result["versions"].keys()
    assert {"torch_threads", "load_before", "load_after"} <= result["hardware"].keys()
    assert BenchSettings.from_dict(result["settings"]).methods == ("dense", METHOD)
    assert "not seen" in result["memory_source"]


def test_check_names_what_fell_and_only_that(result: dict[str, Any]):
    assert check(result, result) == []
    slower = copy.deepcopy(result)
    slower["cells"][1]["decode_speedup"] *= 0.84
    slower["cells"][3]["kv_saving"] *= 0.86
    (line,) = check(result, slower)
    assert METHOD in line and "prompt 24" in line and "decode_speedup" in line and "-16%" in line
    slower["cells"].pop()
    assert check(result, slower)[-1].endswith("not measured")


def test_check_fails_the_command(result: dict[str, Any], tmp_path: Path, monkeypatch, capsys):
    kept = tmp_path / "kept.json"
    kept.write_text(json.dumps(result))
    slower = copy.deepcopy(result)
    slower["cells"][1]["decode_speedup"] /= 2
    monkeypatch.setattr(command, "measure", lambda settings: slower)
    assert cli.main(["bench", "--check", str(kept), "--no-plot", "--out", str(tmp_path)]) == 2
    assert "decode_speedup fell" in capsys.readouterr().err


def test_two_results_side_by_side(result: dict[str, Any], tmp_path: Path, capsys):
    other = copy.deepcopy(result)
    other["versions"]["torch"] = "0.0"
    other["cells"][3]["decode_ms"]["median"] = 2 * result["cells"][3]["decode_ms"]["median"]
    paths = [tmp_path / name for name in ("a.json", "b.json")]
    for path, content in zip(paths, (result, other), strict=True):
        path.write_text(json.dumps(content))
    assert cli.main(["bench", "--compare", *map(str, paths)]) == 0
    printed = capsys.readouterr().out
    assert "2.00" in printed and "differs: versions.torch" in printed and "differs: hardware" not in printed
    other["cells"] = []
    with pytest.raises(ConfigError, match="in common"):
        render_comparison(result, other)
    with pytest.raises(ConfigError, match="not a result"):
        paths[0].write_text("{}")
        load(paths[0])


def test_twins_share_weights_and_nothing_else():
    model = build(shape_config("small", SIZES), torch.float32, torch.device("cpu"), None, 0)
    method = CandidateRunner(model, Candidate(METHOD))
    for mine, yours in zip(model.parameters(), method.model.parameters(), strict=True):
        assert mine is yours
    assert method.model.model.layers[0] is not model.model.layers[0]
    assert "generate" not in model.__dict__ and not model.model._forward_pre_hooks
    inputs = make_inputs(model, 24, 2, seed=0)
    assert (
        CandidateRunner(share_weights(model), Candidate("dense")).run(inputs, 6).kv_bytes
        > method.run(inputs, 6).kv_bytes
    )


def test_compiled_candidates_and_what_dense_means_among_them():
    candidates = BenchSettings(methods=("dense", METHOD), decodes=("eager", "compiled", "auto")).candidates
    names = ["dense", METHOD, "dense (compiled)", f"{METHOD} (compiled)", f"{METHOD} (auto)", "dense (static)"]
    assert [one.name for one in candidates] == names
    model = build(shape_config("small", SIZES), torch.float32, torch.device("cpu"), None, 0)
    ours, theirs = CandidateRunner(model, candidates[2]), CandidateRunner(model, candidates[-1])
    assert ours.handle is not None and ours.handle.config == Dense() and theirs.handle is None
    assert "cache_implementation" in theirs._options and "cache_implementation" not in ours._options


def test_tensor_bytes_count_storages_once_and_let_go():
    with TensorBytes() as counted:
        kept = torch.zeros(1000)
        view = kept[10:].view(9, 110)
        assert (counted.live, counted.peak) == (4000, 4000)
        twice = view * 2
        assert counted.live == 4000 + 3960
        del twice
        kept.add_(1)
        assert (counted.live, counted.peak) == (4000, 7960)


def test_largest_batch_by_arithmetic():
    rows = largest_batch(limit=1000, weight_bytes=100, prefill_peak=400, kv_bytes=40, batch=2)
    assert rows == {"at_once": 6, "one_by_one": 1 + 750 // 20, "kv_only": 45}
    assert largest_batch(1000, 100, None, 40, 2) == {"at_once": None, "one_by_one": None, "kv_only": 45}
    assert set(largest_batch(50, 100, 400, 40, 2).values()) == {0}


@pytest.mark.parametrize(("limit", "guess"), [(0, 1), (1, 1), (37, 1), (37, 37), (37, 64)])
def test_largest_finds_the_limit_from_any_guess(limit: int, guess: int):
    assert largest_fitting(lambda count: count <= limit, guess) == limit


def test_work_of_a_known_geometry():
    config = shape_config("llama-3.1-8b", ["num_hidden_layers=2"])
    model = build(config, torch.bfloat16, torch.device("meta"), None, 0)
    work = ModelCost.of(model)
    layer = 4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336 + 2 * 4096
    assert work.step_bytes == 2 * (2 * layer + 4096 + 128256 * 4096)
    assert work.weight_bytes == work.step_bytes + 2 * 128256 * 4096
    assert work.prompt_flop(10, 3) == pytest.approx(3 * (2 * (2 * layer + 4096) * 10 + 4 * 2 * 4096 * 55))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_a_configuration(shape: str):
    text = shape_config(shape, ["num_hidden_layers=3"]).get_text_config()
    assert text.num_hidden_layers == 3 and text.head_dim in (64, 128)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--shape", "llama-3.1-8B"], "llama-3.1-8b"),
        (["--set", "num_hiden_layers=2"], "num_hidden_layers"),
        (["--set", "layers"], "key=value"),
        (["--model", "x", "--shape", "small"], "either"),
        (["--model", "x", "--set", "hidden_size=8"], "--set"),
        (["--decode", "compild"], "compiled"),
        (["--new-tokens", "3"], "at least 4"),
        (["--rounds", "0"], "at least 1"),
        (["--probe"], "--memory-limit"),
        (["--batch", "1,0"], "positive"),
        (["--memory-limit", "80 apples"], "80GiB"),
        (["--check", "missing.json"], "missing.json"),
    ],
)
def test_what_cannot_work_is_said_before_anything_runs(arguments: list[str], says: str, monkeypatch, capsys):
    monkeypatch.setattr(command, "run_cells", lambda *_: pytest.fail("ran"))
    assert cli.main(["bench", *arguments, "--no-plot"]) == 2
    assert says in capsys.readouterr().err


def test_sizes_and_batches():
    assert parse_bytes("80GiB") == 80 * 2**30 and parse_bytes("1.5kb") == 1500 and parse_bytes("7") == 7
    assert parse_batches("8,1,8") == (1, 8)
