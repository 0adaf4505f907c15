"""Models whose layers, or parts of them, are linear attention: their state goes where the entries go."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import llm_accel
from llm_accel import ConfigError, Handle
from llm_accel.cache.linear import states_of
from llm_accel.patches.cache_name import CACHE
from llm_accel.patches.compiled import call
from llm_accel.patches.compiled.eligible import COMPILED
from tests.families.build import text_model
from tests.tiny import left_padded, prompt

LENGTH, NEW = 40, 5
# layers side by side; both in one layer; layers that hold nothing; one module for several layers
FAMILIES = ("qwen3_next", "falcon_h1", "nemotron_h", "zamba")
METHODS: dict[str, dict[str, Any]] = {
    "snapkv": {"budget": 16, "window": 4},
    "adakv": {"budget": 16, "window": 4, "page": 4},
    "h2o": {"budget": 16},
    "streaming_llm": {"budget": 16},
}

every_family = pytest.mark.parametrize("family", FAMILIES)
every_method = pytest.mark.parametrize("method", METHODS)
every_shape = pytest.mark.parametrize("padded", [False, True], ids=["single", "padded"])


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


@cache
def built(family: str) -> PreTrainedModel:
    return text_model(family)


def batch(padded: bool) -> tuple[Tensor, Tensor | None]:
    return left_padded([LENGTH, 25]) if padded else (prompt(LENGTH), None)


def answers(model: PreTrainedModel, ids: Tensor | None, mask: Tensor | None, **more: Any) -> Tensor:
    """Logits [B, NEW, vocabulary] of greedy decoding."""
    options = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    inputs = {"input_ids": ids, "attention_mask": mask, "suppress_tokens": [0]}
    return torch.stack(model.generate(**(inputs | options | more)).logits, 1)


def applied(model: PreTrainedModel, method: str, **changes: Any) -> Handle:
    return llm_accel.apply(model, method, **(METHODS[method] | changes))


@every_family
@every_method
def test_beams_carry_the_state_along(family: str, method: str) -> None:
    model, ids = built(family), prompt(LENGTH)
    options = {"num_beams": 3, "max_new_tokens": NEW, "do_sample": False}
    plain = model.generate(ids, **options)
    with applied(model, method, budget=LENGTH + NEW):
        assert torch.equal(model.generate(ids, **options), plain)
    with applied(model, method) as handle:
        model.generate(ids, **options)
        assert any(layer.evicted for layer in handle.report().layers)


@every_family
@every_method
@every_shape
def test_compiled_steps_are_the_eager_ones(
    family: str, method: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(call, "backend", lambda: "eager")  # what is captured is to be shown, not what is made of it
    torch._dynamo.reset()
    model, (ids, mask) = built(family), batch(padded)
    if not model.get_decoder()._can_compile_fullgraph:
        with pytest.raises(ConfigError, match="decode='compiled' does not work"):
            applied(model, method, decode="compiled")
        return
    with applied(model, method):
        eager = [answers(model, ids, mask), model.generate(ids, attention_mask=mask, num_beams=2, max_new_tokens=NEW)]
    with applied(model, method, decode="compiled") as handle:
        torch.testing.assert_close(answers(model, ids, mask), eager[0], atol=1e-4, rtol=1e-4)
        assert handle.report().backends["decode steps"] == ("compiled", COMPILED)
        assert torch.equal(model.generate(ids, attention_mask=mask, num_beams=2, max_new_tokens=NEW), eager[1])


@every_family
@every_method
def test_a_saved_cache_goes_on(family: str, method: str, tmp_path: Path) -> None:
    model, ids = built(family), prompt(LENGTH)
    with applied(model, method) as handle:
        cache = handle.new_cache()
        model(ids, **{CACHE: cache})
        handle.save_cache(cache, tmp_path / "cache")
        loaded, more = handle.load_cache(tmp_path / "cache"), prompt(3, seed=8)
        assert torch.equal(model(more, **{CACHE: loaded}).logits, model(more, **{CACHE: cache}).logits)


@every_family
@pytest.mark.parametrize("method", ["snapkv", "adakv", "h2o"])
def test_prompts_read_one_by_one_are_joined(family: str, method: str) -> None:
    model, rows = built(family), [prompt(LENGTH, seed=4)[0], prompt(25, seed=5)[0]]
    with applied(model, method) as handle:
        alone = [answers(model, row[None], None) for row in rows]
        together = answers(model, None, None, **handle.prefill(rows).inputs)
    for row, single in enumerate(alone):
        torch.testing.assert_close(together[row : row + 1], single, atol=1e-4, rtol=1e-4)


@every_family
def test_states_filled_in_inference_mode_go_on_outside(family: str) -> None:
    model, ids, more = built(family), prompt(LENGTH), prompt(1, seed=8)
    with applied(model, "h2o") as handle:
        logits = []
        for inside in (False, True):
            cache = handle.new_cache()
            with torch.inference_mode(inside):
                model(ids, **{CACHE: cache})
            logits.append(model(more, **{CACHE: cache}).logits)
    assert torch.equal(*logits)


@every_family
def test_the_report_counts_the_state_apart(family: str) -> None:
    model, ids = built(family), prompt(LENGTH)
    with applied(model, "snapkv") as handle:
        cache = handle.new_cache()
        model(ids, **{CACHE: cache})
        layers = handle.report().layers
    held = [states_of(layer) for layer in cache.layers]
    assert [layer.state_bytes for layer in layers] == [sum(t.nbytes for t in one.values()) for one in held] and any(
        held
    )
    for layer in layers:
        if layer.skipped_reason is None:
            assert layer.evicted == LENGTH - METHODS["snapkv"]["budget"]
        else:
            assert layer.kv_bytes == 0
            assert layer.state_bytes == 0 or layer.skipped_reason.startswith("linear attention")
