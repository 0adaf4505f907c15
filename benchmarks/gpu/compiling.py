"""What the items of a run compile beside their cases, found out and timed on a machine without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.items import OUT
from llm_accel.kernels import dispatch
from llm_accel.kernels.launch import Launch
from llm_accel.methods import H2O, Dense, HiP, SnapKV

ARCH = 90
PROMPT, STEPS = 1500, 2
# The kernels of a method do not depend on how much is kept, and with little of it a CPU gets through its steps.
SMALL: dict[str, Any] = {
    "dense": Dense(),
    "snapkv": SnapKV(budget=128),
    "h2o": H2O(budget=128),
    "hip": HiP(
        sink=16,
        window=64,
        budget=64,
        stages=((256, None, 4), (32, 512, 4), (8, 128, 1)),
        min_prefill_len=0,
        edge_layers=(),
    ),
}


class Recorder(TorchDispatchMode):
    """Launches of our operations are collected, whatever the device. On tensors without data that is all; with
    ``stand_ins`` for the kernels everything goes on as on a GPU."""

    def __init__(self, plans: dict[str, Callable[..., Any]], stand_ins: dict[str, Callable[..., Any]] | None = None):
        super().__init__()
        self.launches: list[Launch] = []
        self._plans, self._stand_ins = plans, stand_ins

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plan = self._plans.get(func._opname) if func.namespace == "llm_accel" else None
        if plan is None:
            return func(*args, **(kwargs or {}))
        result, launches = plan(*args, **(kwargs or {}))
        self.launches += launches
        return result if self._stand_ins is None else self._stand_ins[func._opname](*args, **(kwargs or {}))


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Kernels are chosen as on a GPU."""
    with mock.patch.object(dispatch, "_why_no_triton", lambda device: None):
        yield


def kernels_of_methods(methods: Iterable[str], compiled: bool) -> list[Launch]:
    """Launches of a prompt and some steps, heads and channels as in Llama-3.1-8B."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    import llm_accel
    from llm_accel.patches.cache_name import CACHE
    from llm_accel.patches.compiled import call
    from tests.kernels.stand_ins import PLANS, STAND_INS

    shape = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=64, **shape)
    recorder = Recorder(PLANS, STAND_INS)
    as_it_is = mock.patch.object(call.DecodeCall, "_compiled", lambda *_: call._step)
    for method in methods:
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        decode: Any = "compiled" if compiled else "eager"
        handle = llm_accel.apply(model, SMALL[method], decode=decode)
        cache, token = handle.new_cache(), torch.ones(1, PROMPT, dtype=torch.long)
        with torch.no_grad(), as_on_a_gpu(), as_it_is, recorder:
            for _ in range(STEPS + 1):
                token = model(token, **{CACHE: cache}).logits[:, -1:].argmax(-1)
    return recorder.launches


def kernels_of_tests(command: Sequence[str]) -> list[Launch]:
    """Launches of the tests that a command of pytest runs, under Triton's interpreter, which says whether they pass and
    so how far they get."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "launches.jsonl"
        given = [part.replace(OUT, folder) for part in command]
        if "-n" in given:
            at = given.index("-n")
            given[at : at + 2] = []
        arguments = [sys.executable, *given, "-p", "benchmarks.gpu.recorded", "--launches", str(path)]
        subprocess.run(arguments, env=os.environ | {"TRITON_INTERPRET": "1"}, stdout=subprocess.DEVNULL, check=True)
        return [rebuilt(json.loads(line)) for line in set(path.read_text(encoding="utf-8").splitlines())]


def rebuilt(record: dict[str, Any]) -> Launch:
    """A launch that compiles to the code of the one that ``benchmarks.gpu.recorded`` wrote down."""
    import importlib

    def value(given: Any) -> Any:
        if not isinstance(given, str):
            return given
        return torch.empty(1, dtype=getattr(torch, given), device="meta")

    kernel = getattr(importlib.import_module(record["module"]), record["kernel"])
    constants = record["constants"] | ({"UPCAST": False} if "UPCAST" in record["constants"] else {})
    arguments = {name: value(given) for name, given in record["arguments"].items()}
    return Launch(kernel, (1,), arguments, constants, record["warps"], record["stages"])


def compile_seconds(launches: Sequence[Launch]) -> float:
    """Seconds of a processor to compile kernels that no cache has."""
    from triton import knobs

    from tests.kernels import aot

    with tempfile.TemporaryDirectory() as place, knobs.cache.scope():
        knobs.cache.dir = place
        begin = processor()
        for launch in launches:
            aot.compile_for(launch, ARCH)
        return processor() - begin


def graph_seconds(layers: int) -> float:
    """Seconds of a processor to trace, differentiate and lower the graph of a decode step; what its own kernels take is
    not in it, for a CPU has others."""
    from torch._inductor.async_compile import AsyncCompile

    import llm_accel
    from benchmarks import compiled_host
    from llm_accel.patches.cache_name import CACHE

    torch._dynamo.reset()
    uncompiled = mock.patch.object(AsyncCompile, "cpp_pybinding", lambda *_: lambda *arguments: None)
    uncached = torch._inductor.config.patch(force_disable_caches=True)
    with uncompiled, uncached, torch.no_grad(), mock.patch.object(compiled_host, "LAYERS", layers):
        model: Any = compiled_host.model_of("snapkv:budget=64")
        cache = llm_accel.Handle(model, model.generate.hook).new_cache()
        model(torch.ones(1, compiled_host.PROMPT, dtype=torch.long), **{CACHE: cache})
        begin = processor()
        model(torch.zeros(1, 1, dtype=torch.long), **{CACHE: cache})
        return processor() - begin


def processor() -> float:
    """Seconds that this process and those it waited for have computed: other work on the machine does not count."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system
