"""A call that fails between two layers: what it left in layers that do not count tokens is not gone on with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import llm_accel
from llm_accel import SnapKV, UnsupportedCallError
from llm_accel.patches.cache_name import CACHE
from tests.families.build import TEXT, text_model
from tests.patches.calls import failing_once
from tests.tiny import prompt

KEEP = SnapKV(budget=24, window=8)
IDS, MORE = prompt(60), prompt(7, seed=2)
# after which layer a call fails; those of full attention are all alike by then, and others are not
LAYERS = {"bailing_hybrid": 2, "granitemoehybrid": 2, "gemma3n_text": 1, "lfm2_moe": 0}
FAMILIES = tuple(family for family in LAYERS if family in TEXT)


def failing_layer(model: PreTrainedModel, index: int) -> torch.nn.Module:
    layer = model.get_decoder().layers[index]
    assert isinstance(layer, torch.nn.Module)
    return layer


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("turn", [1, 2])
def test_a_cache_that_is_torn_is_not_gone_on_with(family: str, turn: int, tmp_path: Path) -> None:
    model = text_model(family)
    with llm_accel.apply(model, KEEP) as handle:
        cache = handle.new_cache()
        if turn == 2:
            model(IDS, **{CACHE: cache})
        with failing_once(failing_layer(model, LAYERS[family])):
            model(IDS if turn == 1 else MORE, **{CACHE: cache})
        with pytest.raises(UnsupportedCallError, match="an earlier call on this cache failed half-way"):
            model(MORE, **{CACHE: cache})
        if cache.get_seq_length():
            with pytest.raises(UnsupportedCallError, match="an earlier call on this cache failed half-way"):
                handle.save_cache(cache, tmp_path / "cache.safetensors")
        assert not list(tmp_path.iterdir())


@torch.no_grad()
@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family != "gemma3n_text"]
)  # 5.17 resets no windows
def test_a_torn_cache_that_was_emptied_is_whole_again(family: str) -> None:
    model = text_model(family)
    with llm_accel.apply(model, KEEP) as handle:
        cache = handle.new_cache()
        with failing_once(failing_layer(model, LAYERS[family])):
            model(IDS, **{CACHE: cache})
        cache.reset()
        assert torch.equal(model(IDS, **{CACHE: cache}).logits, model(IDS, **{CACHE: handle.new_cache()}).logits)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_that_was_refused_has_left_nothing(family: str) -> None:
    model = text_model(family)
    gap = torch.ones(1, 67, dtype=torch.long)
    gap[0, 30] = 0
    with llm_accel.apply(model, KEEP) as handle:
        cache, other = handle.new_cache(), handle.new_cache()
        model(IDS, **{CACHE: cache})
        with pytest.raises(UnsupportedCallError, match="padding after a real token"):
            model(MORE, attention_mask=gap, **{CACHE: cache})
        model(IDS, **{CACHE: other})
        assert torch.equal(model(MORE, **{CACHE: cache}).logits, model(MORE, **{CACHE: other}).logits)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_that_met_a_call_without_the_plug_in_is_not_gone_on_with(family: str) -> None:
    """Layers before the one that refuses have taken the tokens in, and no length shows it."""
    model = text_model(family)
    cache = llm_accel.apply(model, KEEP).new_cache()
    model(IDS, **{CACHE: cache})
    llm_accel.remove(model)
    with pytest.raises(UnsupportedCallError, match="this call runs without it"):
        model(MORE, **{CACHE: cache})
    with (
        llm_accel.apply(model, KEEP),
        pytest.raises(UnsupportedCallError, match="an earlier call on this cache failed"),
    ):
        model(MORE, **{CACHE: cache})
