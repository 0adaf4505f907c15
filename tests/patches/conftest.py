from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from llm_accel.patches.compiled import call
from tests.tiny import tiny_model


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    """No gradients and one thread, as everywhere outside of training."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama")


class Counting:
    """Runs captured graphs as they are and counts them, and how often they ran; inside of what ``within`` makes."""

    def __init__(self) -> None:
        self.graphs = self.runs = 0
        self.within: Callable[[], AbstractContextManager[object]] = nullcontext

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        self.graphs += 1

        def run(*tensors: torch.Tensor) -> Any:
            self.runs += 1
            with self.within():
                return graph.forward(*tensors)

        return run


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counting]:
    """The compiler of a test of compiled decoding: what is captured is what is to be shown, not what is made of it."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)  # as in test_compile
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    backend = Counting()
    monkeypatch.setattr(call, "backend", lambda: backend)
    yield backend
    torch._dynamo.reset()
