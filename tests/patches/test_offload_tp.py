"""Weights that live elsewhere: offloaded by accelerate, or split over two processes by tensor parallelism."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from transformers import AutoModelForCausalLM, PreTrainedModel

import llm_accel
from tests.patches.calls import logits_of, snapkv
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[2]
CLOSE = 1e-5
SPLIT = ("llama", "qwen3")


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


def tensor_parallel(rank: int, folder: str) -> None:
    """One of the two processes: same checkpoint, split weights, numbers of the single process."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    for family in SPLIT:
        model = AutoModelForCausalLM.from_pretrained(Path(folder) / family, tp_plan="auto").eval()
        dense = logits_of(model)
        for method, logits in torch.load(Path(folder) / f"{family}.pt").items():
            handle = llm_accel.apply(model, method, budget=40, trace=True)
            difference = float((logits_of(model) - logits).abs().max())
            assert difference <= CLOSE, (family, method, difference)
            assert handle.report().layers[0].kept.shape == (2, 1, 40), "each process holds one of two KV heads"
            handle.remove()
        assert torch.equal(logits_of(model), dense)
    torch.distributed.destroy_process_group()
    print(f"rank {rank} agrees")


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    for family in SPLIT:
        model, expected = tiny_model(family), {}
        model.save_pretrained(tmp_path / family)
        for method in ("snapkv", "streaming_llm"):
            with llm_accel.apply(model, method, budget=40):
                expected[method] = logits_of(model)
        torch.save(expected, tmp_path / f"{family}.pt")
    script = (
        "import sys; from tests.patches import test_offload_tp as t; t.tensor_parallel(int(sys.argv[1]), sys.argv[2])"
    )
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank), str(tmp_path)],
            cwd=ROOT,
            env=os.environ | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=180)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, output[-3000:]
        assert f"rank {rank} agrees" in output


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
