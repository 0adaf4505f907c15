"""torch.compile around a plugged-in model: the same numbers as eager, no graph break, no recompilation per step."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

import llm_accel
from tests.patches.calls import BUDGET, IDS, MASK, Outside, snapkv
from tests.tiny import prompt

CLOSE = 1e-5
STEPS = 3


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # structured traces, which nobody reads here, cost most of the time as soon as pytest listens to loggers
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def model(model: PreTrainedModel) -> PreTrainedModel:
    """One layer is enough to be compiled."""
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    return model


class CountingBackend:
    """Runs the captured graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


def decode(
    call: Callable[..., Any], cache: DynamicCache, ids: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits of the last prompt token and of STEPS decoded ones, [B, 1 + STEPS, vocabulary]."""
    logits = [call(ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits[:, -1]]
    for step in range(STEPS):
        token = torch.full((ids.shape[0], 1), step + 5)
        if mask is not None:
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        logits.append(call(token, attention_mask=mask, past_key_values=cache, use_cache=True).logits[:, -1])
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize(("method", "mask"), [("snapkv", MASK), ("streaming_llm", None)])
def test_compiled_equals_eager(model: PreTrainedModel, method: str, mask: torch.Tensor | None) -> None:
    handle = llm_accel.apply(model, method, budget=40)
    eager = handle.new_cache()
    expected = decode(model, eager, IDS, mask)
    compiled = torch.compile(model, backend="eager", dynamic=True)
    for cache in (handle.new_cache(), copy.deepcopy(handle.new_cache())):
        assert (decode(compiled, cache, IDS, mask) - expected).abs().max() <= CLOSE
        for ours, other in zip(cache.layers, eager.layers, strict=True):
            assert ours.physical_length() == other.physical_length() < ours.get_seq_length()


def test_one_graph_for_a_prompt_and_one_for_all_decoding(model: PreTrainedModel) -> None:
    handle, backend = snapkv(model), CountingBackend()
    compiled = torch.compile(model, backend=backend, dynamic=True)
    for length, graphs in ((60, 2), (60, 2), (73, 3), (73, 3)):
        cache = handle.new_cache()
        decode(compiled, cache, prompt(length))
        assert backend.graphs == graphs
        assert cache.layers[0].physical_length() == BUDGET + STEPS
    assert not torch._dynamo.utils.counters["graph_break"]


def test_apply_and_remove_around_a_compiled_model(model: PreTrainedModel) -> None:
    dense = decode(model, DynamicCache(config=model.config), IDS)
    compiled = torch.compile(model, backend="eager", dynamic=True)
    assert (decode(compiled, DynamicCache(config=model.config), IDS) - dense).abs().max() <= CLOSE
    with snapkv(model) as handle:
        ours = decode(model, handle.new_cache(), IDS)
        cache = DynamicCache(config=model.config)
        assert (decode(compiled, cache, IDS) - ours).abs().max() <= CLOSE
        assert cache.layers[0].physical_length() == BUDGET + STEPS
        with handle.disabled():
            assert (decode(compiled, DynamicCache(config=model.config), IDS) - dense).abs().max() <= CLOSE
    assert (decode(compiled, DynamicCache(config=model.config), IDS) - dense).abs().max() <= CLOSE


def test_apply_and_remove_take_the_compiled_model_too(model: PreTrainedModel) -> None:
    before, dense = Outside.of(model), decode(model, DynamicCache(config=model.config), IDS)
    compiled = torch.compile(model, backend="eager", dynamic=True)
    handle = llm_accel.apply(compiled, "snapkv", budget=BUDGET, window=8)
    cache = handle.new_cache()
    ours = decode(model, handle.new_cache(), IDS)
    assert (decode(compiled, cache, IDS) - ours).abs().max() <= CLOSE
    assert cache.layers[0].physical_length() == BUDGET + STEPS
    with pytest.raises(llm_accel.AlreadyAppliedError):
        llm_accel.apply(compiled, "snapkv")
    llm_accel.remove(compiled)
    after = Outside.of(model)
    assert (after.hooks, after.implementation, after.config) == (before.hooks, before.implementation, before.config)
    assert "generate" not in after.attributes
    assert (decode(compiled, DynamicCache(config=model.config), IDS) - dense).abs().max() <= CLOSE


def test_generate_of_a_model_compiled_in_place(model: PreTrainedModel) -> None:
    options = {"max_new_tokens": STEPS, "do_sample": False}
    handle = snapkv(model)
    expected = model.generate(IDS, attention_mask=MASK, **options)
    model.compile(backend="eager", dynamic=True)
    assert torch.equal(model.generate(IDS, attention_mask=MASK, **options), expected)
    assert handle.report().layers[0].physical_length == BUDGET + STEPS - 1
