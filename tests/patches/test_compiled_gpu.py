"""Compiled decoding on a GPU: the numbers of eager decoding from replayed CUDA graphs, and a host that never waits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import llm_accel
from llm_accel.registry import parse_all
from tests.patches.test_compiled_decode import METHODS, generate, layers_of, shallow
from tests.patches.test_compiled_hip import SMALL
from tests.tiny import left_padded

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = "cuda"
CLOSE = 1e-4  # kernels add in another order than eager attention
EVERY = (*METHODS, "dense:capacity=256")
PROMPTS = ([60, 41], [90, 70])


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing compiled before, and nothing left behind."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def pair(method: str) -> tuple[PreTrainedModel, PreTrainedModel, llm_accel.Handle]:
    """The same model twice, decoding eagerly and as the plug-in chooses here, and the handle of the latter."""
    eager, compiled = (shallow(layers=layers_of(method)).to(DEVICE) for _ in range(2))
    configs = parse_all(method)
    llm_accel.apply(eager, configs)
    return eager, compiled, llm_accel.apply(compiled, configs, decode="auto")


def check(compiled: PreTrainedModel, eager: PreTrainedModel, lengths: list[int]) -> None:
    """Equal tokens and close logits after one batch of prompts."""
    ours, expected = generate(compiled, lengths), generate(eager, lengths)
    assert torch.equal(ours[0], expected[0])
    assert (ours[1] - expected[1]).abs().max() <= CLOSE


@pytest.mark.parametrize("method", EVERY)
def test_auto_compiles_and_equals_eager(method: str) -> None:
    eager, compiled, handle = pair(method)
    for lengths in (*PROMPTS, *PROMPTS):
        check(compiled, eager, lengths)
    counters: Any = torch._dynamo.utils.counters
    assert handle.report().backends["decode steps"][0] == "compiled"
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert not counters["inductor"]["cudagraph_skips"]


@pytest.mark.parametrize("method", EVERY)
def test_the_host_never_waits_in_a_step(method: str) -> None:
    _, model, handle = pair(method)
    ids, mask = (given.to(DEVICE) for given in left_padded([60, 41]))
    cache, token = handle.new_cache(), torch.tensor([[5], [6]], device=DEVICE)
    model(ids, attention_mask=mask, past_key_values=cache)
    for step in range(8):
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        positions = mask.sum(1, keepdim=True) - 1
        torch.cuda.set_sync_debug_mode("error" if step > 4 else "default")  # before, the graph is made and recorded
        try:
            model(token, attention_mask=mask, position_ids=positions, past_key_values=cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_hip_has_a_graph_for_each_pattern() -> None:
    eager, compiled, handle = pair(SMALL)
    for _ in range(3):
        check(compiled, eager, [150, 131])
    counters: Any = torch._dynamo.utils.counters
    assert handle.report().backends["decode steps"][0] == "compiled"
    assert counters["stats"]["unique_graphs"] == 4 and not counters["graph_break"]


def test_another_thread_decodes_too() -> None:
    eager, compiled, _ = pair(METHODS[0])
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with torch.no_grad():
                check(compiled, eager, PROMPTS[0])
        except BaseException as error:
            failures.append(error)

    check(compiled, eager, PROMPTS[0])
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures, failures
    check(compiled, eager, PROMPTS[1])
