"""Long answers: what decoding holds and what a step costs depend neither on the prompt nor on what was generated."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import llm_accel
from llm_accel import RetrievalHeads, StreamingLLM
from llm_accel.methods import MethodConfig
from tests.contracts.matrix import BUDGET, METHODS
from tests.tiny import VOCABULARY, prompt, tiny_model

STEPS = 300
CONSTANT: dict[str, Callable[[], MethodConfig]] = {
    "h2o": METHODS["h2o"],
    "streaming_llm": METHODS["streaming_llm"],
    "streaming_llm, ranks": lambda: StreamingLLM(budget=BUDGET, positions="cache"),
    "retrieval_heads": lambda: RetrievalHeads(full=0.0, sinks=4, recent=BUDGET - 4),
}
FIXED: dict[str, Callable[[], MethodConfig]] = {
    **METHODS,
    **CONSTANT,
    "retrieval_heads, full_budget": lambda: RetrievalHeads(
        head_list=("0.0", "1.1"), sinks=4, recent=BUDGET - 4, full_budget=BUDGET + 16
    ),
}


def tensors() -> tuple[int, int]:
    """How many tensors are alive, and the bytes that they show."""
    gc.collect()
    alive = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
    return len(alive), sum(tensor.nbytes for tensor in alive)


@pytest.mark.parametrize("method", CONSTANT)
def test_300_steps_hold_what_one_step_holds(method: str) -> None:
    model, token, held, lengths, alive, traced = tiny_model("llama"), prompt(72), set(), set(), [], []
    with torch.inference_mode(), llm_accel.apply(model, CONSTANT[method]()) as handle:
        cache = handle.new_cache()
        for step in range(STEPS + 1):
            token = model(token, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
            report = handle.report()
            held.add(report.kv_bytes)
            lengths |= {layer.physical_length for layer in report.layers}
            if step == 20:
                tracemalloc.start()
            if step in (50, STEPS):
                alive.append(tensors())
                traced.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    assert len(held) == 1
    assert lengths == {BUDGET + getattr(CONSTANT[method](), "empty_slots", 0)}
    assert alive[0] == alive[1]
    assert traced[1] - traced[0] < 64 * 1024  # what Python allocates on the side is no list of steps


class Shapes(TorchDispatchMode):
    """Records each operation with the shapes of the tensors that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        self.seen.append((str(operation), [tuple(leaf.shape) for leaf in leaves if torch.is_tensor(leaf)]))
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", FIXED)
def test_a_step_does_the_same_work_after_any_prompt(method: str) -> None:
    work = []
    for length in (72, 250):
        model = tiny_model("llama")
        with torch.inference_mode(), llm_accel.apply(model, FIXED[method]()) as handle:
            cache = handle.new_cache()
            model(prompt(length), past_key_values=cache)
            model(prompt(1), past_key_values=cache)
            with Shapes() as shapes:
                model(prompt(1), past_key_values=cache)
        work.append(shapes.seen)
    if (
        getattr(FIXED[method](), "page_size", None) is not None
    ):  # how long heads are and when they need pages depends on what the prompt says
        assert max(max(shape, default=1) for _, shapes in work[1] for shape in shapes) <= VOCABULARY
    else:
        assert work[0] == work[1]


def test_dense_work_grows_with_the_prompt() -> None:
    """The recorder sees what it must not find elsewhere."""
    largest = []
    for length in (72, 250):
        model, cache = tiny_model("llama"), None
        with torch.inference_mode():
            cache = model(prompt(length)).past_key_values
            with Shapes() as shapes:
                model(prompt(1), past_key_values=cache)
        largest.append(max(max(shape, default=1) for _, given in shapes.seen for shape in given))
    assert largest[1] > largest[0] >= 72
