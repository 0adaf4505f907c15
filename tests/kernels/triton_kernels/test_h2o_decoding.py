"""H2O decodes with one operation per layer and step where Triton is chosen: the same tokens, slots and scores as with
the model's own attention and the scores beside it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

import llm_accel
from llm_accel import H2O
from llm_accel.kernels import dispatch, slot_decode
from llm_accel.kernels.dispatch import interpreting
from llm_accel.report import Report
from tests.contracts.matrix import BUDGET, Batch, generate, make_batch
from tests.tiny import tiny_model

pytestmark = pytest.mark.skipif(not interpreting(), reason="the models of the contracts run on the CPU")
CLOSE = 1e-5
STEPS = 7


class Backends:
    """Chooses the backend of a decode step, and counts the steps that the operation does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch, self.calls = monkeypatch, 0
        run = slot_decode.slot_decode

        def counted(*args: object, **kwargs: object) -> object:
            self.calls += 1
            return run(*args, **kwargs)

        monkeypatch.setattr(slot_decode, "slot_decode", counted)

    def take(self, name: str) -> None:
        self.monkeypatch.setenv(dispatch.VARIABLE, f"slot_decode={name},column_votes=torch,gather_entries=torch")
        dispatch._requests.cache_clear()
        self.calls = 0


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> Iterator[Backends]:
    yield Backends(monkeypatch)
    monkeypatch.undo()
    dispatch._requests.cache_clear()


def decoded(family: str, config: H2O, batch: Batch) -> tuple[Tensor, Tensor, DynamicCache, Report]:
    model = tiny_model(family)
    with llm_accel.apply(model, config, trace=True) as handle:
        cache = handle.new_cache()
        tokens, logits = generate(model, batch, max_new_tokens=STEPS, past_key_values=cache)
        return tokens, logits, cache, handle.report()


@pytest.mark.parametrize(
    ("family", "config", "shape"),
    [
        ("llama", H2O(budget=BUDGET), "padded"),
        ("llama", H2O(budget=BUDGET, decay=0.8, norm="mean", sinks=0), "padded"),
        ("llama", H2O(heavy=0, recent=BUDGET, sinks=0), "single"),
        ("gemma2", H2O(budget=BUDGET), "single"),
        ("gpt_oss", H2O(budget=BUDGET), "padded"),
        ("deepseek_v3", H2O(budget=BUDGET), "single"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.spec(),
)
def test_equals_the_models_own_attention(family: str, config: H2O, shape: str, backends: Backends) -> None:
    batch = make_batch(shape, long=True)
    backends.take("torch")
    tokens, logits, plain, _ = decoded(family, config, batch)
    assert backends.calls == 0
    backends.take("triton")
    ours, our_logits, cache, report = decoded(family, config, batch)
    acting = [layer.layer for layer in report.layers if layer.skipped_reason is None]
    assert report.backends["decode"][0] == "triton" and backends.calls == len(acting) * (STEPS - 1)
    assert torch.equal(ours, tokens)
    assert (our_logits - logits).abs().max() <= CLOSE
    for index in acting:
        layer, expected = cache.layers[index], plain.layers[index]
        assert torch.equal(layer.seen_positions(), expected.seen_positions())
        assert torch.equal(layer.spare, expected.spare)
        assert (layer.scores - expected.scores).abs().max() <= CLOSE


def test_attention_is_the_models_own_while_nothing_is_cut(backends: Backends) -> None:
    batch = make_batch("padded", long=True)
    dense = generate(tiny_model("llama"), batch, max_new_tokens=STEPS)[1]
    backends.take("triton")
    assert torch.equal(decoded("llama", H2O(budget=200), batch)[1], dense)
    assert backends.calls == 0
