"""Weights that live elsewhere: offloaded by accelerate, or split over two processes by tensor parallelism."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from transformers import PreTrainedModel

from tests.patches import tensor_parallel
from tests.patches.calls import logits_of, snapkv
from tests.tiny import tiny_model
from tests.tiny_vlm import tiny_vlm

ROOT = Path(__file__).parents[2]


def dispatch_to_disk(model: PreTrainedModel, folder: Path) -> None:
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.layers.{index}": "disk" if index else "cpu" for index in range(3)}
    dispatch_model(model, device_map, main_device="cpu", offload_dir=folder, force_hooks=True)


OFFLOADS: dict[str, Callable[[PreTrainedModel, Path], object]] = {
    "cpu": lambda model, folder: cpu_offload(model, execution_device=torch.device("cpu")),
    "disk": lambda model, folder: disk_offload(model, folder, execution_device=torch.device("cpu")),
    "dispatch": dispatch_to_disk,
}


@pytest.mark.parametrize("first", ["apply", "offload"])
@pytest.mark.parametrize("kind", OFFLOADS)
def test_offloaded_weights(model: PreTrainedModel, tmp_path: Path, kind: str, first: str) -> None:
    dense = logits_of(model)
    with snapkv(model):
        ours = logits_of(model)
    handle = snapkv(model) if first == "apply" else None
    OFFLOADS[kind](model, tmp_path)
    assert model.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    handle = handle or snapkv(model)
    assert torch.equal(logits_of(model), ours)
    with handle.disabled():
        assert torch.equal(logits_of(model), dense)
    handle.remove()
    assert torch.equal(logits_of(model), dense)
    assert model.model.layers[1].mlp.up_proj.weight.device.type == "meta"


@pytest.mark.parametrize("family", ["llama", "llava"])
def test_methods_where_accelerate_chose_the_places(tmp_path: Path, family: str) -> None:
    """Some layers are on disk until they are called; every method answers as it does in memory."""
    whole = tiny_model(family) if family in tensor_parallel.TEXT else tiny_vlm(family)
    whole.save_pretrained(tmp_path)
    tensor_parallel.write_profile(whole, tmp_path / "heads.json")
    half = {"cpu": sum(weight.nbytes for weight in whole.parameters()) // 2}
    model = type(whole).from_pretrained(tmp_path, device_map="auto", max_memory=half, offload_folder=tmp_path / "disk")
    model.generation_config = whole.generation_config
    assert {"cpu", "disk"} <= set(map(str, model.hf_device_map.values()))
    for case, options in tensor_parallel.CASES[family].items():
        with tensor_parallel.applied(whole, tmp_path, case, options):
            wanted = tensor_parallel.answer(whole)
        with tensor_parallel.applied(model, tmp_path, case, options):
            assert torch.equal(tensor_parallel.answer(model), wanted), case


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Every method on several models, with the attention heads of each layer spread over two processes."""
    tensor_parallel.prepare(tmp_path)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, "-m", "tests.patches.tensor_parallel", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        assert done.stdout.count(f"rank {rank} agrees on") == sum(map(len, tensor_parallel.CASES.values()))
