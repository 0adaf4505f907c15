"""Families that are not declared, and all those of the zoo: what needs no vision tower is right by references made by
hand, single and in padded batches, or refused before anything is touched, for a reason that is true."""

from __future__ import annotations

import copy
import functools
from functools import cache
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

import llm_accel
from llm_accel import ConfigError, FastV, RandomTokens, SnapKV, UnsupportedCallError, UnsupportedModelError
from tests import vlm_zoo
from tests.patches.calls import Outside
from tests.tiny_vlm import IMAGE, decode
from tests.vision_oracle import hidden, left_behind, removed
from tests.vlm_zoo import feature_rows, images_in, scene, scenes

EXACT = 2e-4
OWN_MASKS = ("gemma4", "molmo2")
ROWS_UNKNOWN = ("granite4_vision",)
FEATURES_ELSEWHERE = ("llama4",)
RECURRENT = ("lfm2_vl", "qwen3_5", "qwen3_5_moe", "minicpmv4_6")
CUT = [name for name in vlm_zoo.CONFIGS if name not in OWN_MASKS + ROWS_UNKNOWN]
DROP = [name for name in CUT if name not in FEATURES_ELSEWHERE]


@cache
def built(name: str) -> PreTrainedModel:
    """A model that its own transformers can run; it is the same for all tests."""
    model = vlm_zoo.built(name)
    try:
        decode(model, scene(model))
    except (AttributeError, TypeError) as error:
        pytest.skip(f"the unpatched {name} of this transformers fails: {error}")
    return model


def dropped_by(model: PreTrainedModel, batch: dict[str, Any], method: Any) -> torch.Tensor:
    """Which tokens of a single row the method drops, bool [T], read from the features alone."""
    with llm_accel.apply(model, method):
        rows = feature_rows(model, images_in(batch))
    dropped = torch.zeros(batch["input_ids"].shape[1], dtype=torch.bool)
    dropped[batch["input_ids"][0] == IMAGE] = rows[:, -1].isnan()
    return dropped


@pytest.mark.parametrize("name", DROP)
def test_dropping_rows_equals_taking_them_out_by_hand(name: str) -> None:
    model = built(name)
    batch, outside = scene(model), Outside.of(model)
    dense = decode(model, batch)[1]
    with llm_accel.apply(model, "stride_tokens", budget=999):
        assert torch.equal(decode(model, batch)[1], dense)
    for method in (RandomTokens(ratio=0.5), llm_accel.StrideTokens(ratio=0.5)):
        with llm_accel.apply(model, method) as handle:
            _, logits = decode(model, batch)
            report = handle.report()
        dropped, visual = dropped_by(model, batch, method), int((batch["input_ids"] == IMAGE).sum())
        assert 0 < int(dropped.sum()) < visual
        assert torch.allclose(logits[0], removed(model, copy.deepcopy(batch), dropped), atol=EXACT)
        assert (report.visual_tokens_before, report.visual_tokens_after) == (visual, visual - int(dropped.sum()))
    assert Outside.of(model) == outside and torch.equal(decode(model, batch)[1], dense)


@pytest.mark.parametrize("name", CUT)
def test_a_cut_between_layers_equals_rows_that_stay_behind(name: str) -> None:
    model = built(name)
    batch = scene(model)
    with llm_accel.apply(model, "dyvte", exit=1):
        _, logits = decode(model, batch)
    reference = left_behind if name in RECURRENT else hidden
    assert torch.allclose(logits[0], reference(model, batch, batch["input_ids"][0] == IMAGE, behind=1), atol=EXACT)


@pytest.mark.parametrize("name", CUT)
def test_rows_of_a_padded_batch_are_what_they_are_alone(name: str) -> None:
    model = built(name)
    batch, alone = scenes(model)

    def difference() -> float:
        rows = decode(model, copy.deepcopy(batch))[1]
        singles = [decode(model, copy.deepcopy(one))[1][0] for one in alone]
        return max(float((row - one).abs().max()) for row, one in zip(rows, singles, strict=True))

    own = difference()  # recurrent layers round differently behind padding
    if own > 5e-3:
        pytest.skip(f"rows of the unpatched {name} depend on their batch")
    methods: list[Any] = [llm_accel.DyVTE(exit=1), FastV(layer=2, budget=2), SnapKV(budget=8, window=4)]
    methods += [] if name in FEATURES_ELSEWHERE else [llm_accel.StrideTokens(ratio=0.5)]
    for method in methods:
        with llm_accel.apply(model, method):
            try:
                assert difference() <= 4 * own + EXACT, method
            except UnsupportedCallError as error:
                assert "as one tensor" in str(error)  # older versions join the features of all images


@pytest.mark.parametrize("name", CUT)
def test_beside_a_kv_method(name: str) -> None:
    model = built(name)
    batch = scene(model)
    with llm_accel.apply(model, [FastV(layer=2, ratio=0.5), SnapKV(budget=6, window=2)]) as handle:
        decode(model, batch)
        assert max(layer.physical_length for layer in handle.report().layers) <= 6 + 5


@pytest.mark.parametrize("name", vlm_zoo.CONFIGS)
def test_a_kv_method_alone(name: str) -> None:
    model = built(name)
    batch, outside = scene(model), Outside.of(model)
    dense = decode(model, batch)[1]
    if name in OWN_MASKS:
        with pytest.raises(UnsupportedModelError, match=f"{name} builds the masks of its decoder itself"):
            llm_accel.apply(model, "snapkv", budget=8, window=4)
    else:
        with llm_accel.apply(model, "snapkv", budget=500):
            assert torch.allclose(decode(model, batch)[1], dense, atol=EXACT)
        with llm_accel.apply(model, "snapkv", budget=8, window=4) as handle:
            decode(model, batch)
            assert max(layer.physical_length for layer in handle.report().layers) == 8 + 5
    assert Outside.of(model) == outside and torch.equal(decode(model, batch)[1], dense)


@pytest.mark.parametrize(
    "method", ["stride_tokens", "random_tokens", "fastv", "dyvte", "vasparse", "flowcut", "visionzip"]
)
@pytest.mark.parametrize(
    ("name", "words"),
    [
        *[(name, "builds the masks of its decoder itself") for name in OWN_MASKS],
        ("granite4_vision", "also gets deepstack_features, vision_mask, and which entry belongs to which row"),
    ],
)
def test_families_that_are_refused(name: str, words: str, method: str) -> None:
    if (name, method) == ("granite4_vision", "vasparse"):
        pytest.skip("it takes no rows out of what the decoder gets")
    model = built(name)
    outside = Outside.of(model)
    with pytest.raises(UnsupportedModelError, match=words):
        llm_accel.apply(model, method)
    assert Outside.of(model) == outside


def test_features_that_are_projected_later_are_refused() -> None:
    model = vlm_zoo.built("llama4")
    outside = Outside.of(model)
    with pytest.raises(UnsupportedModelError, match="llama4 reads last_hidden_state there and computes on"):
        llm_accel.apply(model, "stride_tokens", budget=2)
    llm_accel.apply(model, "dyvte", exit=1).remove()
    assert Outside.of(model) == outside


def test_no_ranking_by_a_layer_without_attention() -> None:
    model = built("qwen3_5")
    with pytest.raises(ConfigError, match=r"attention of layer 2, but that layer of qwen3_5 has none.*: 1, 3"):
        llm_accel.apply(model, "fastv", layer=3, budget=2)


def test_recurrent_layers_are_what_they_are_called_here() -> None:
    for name in RECURRENT:
        layers = DynamicCache(config=built(name).get_decoder().config).layers
        assert any(not isinstance(layer, CacheLayerMixin) for layer in layers)


def test_methods_that_look_into_the_tower_are_refused() -> None:
    model = built("aya_vision")
    outside = Outside.of(model)
    for method in ("flowcut", "visionzip", "downsample"):
        with pytest.raises(UnsupportedModelError, match="must know the vision tower, and aya_vision is not among"):
            llm_accel.apply(model, method)
    with llm_accel.apply(model, "stride_tokens", budget=2) as handle:
        decode(model, scene(model))
        assert handle.report().backends["visual tokens"][0] == "generic" and "not among the tested" in str(
            handle.report()
        )
    assert Outside.of(model) == outside


def test_an_argument_per_token_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that gets one more tensor, and one whose layers do."""
    model = built("aya_vision")
    decoder = type(model.get_decoder())
    original, holder = type(model.base_model).forward, type(model.base_model)

    @functools.wraps(original)
    def more(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs, hints=torch.zeros_like(kwargs["input_ids"]))

    monkeypatch.setattr(holder, "forward", more)
    for method in ("stride_tokens", "dyvte", "fastv"):
        with pytest.raises(UnsupportedModelError, match="also gets hints, and which entry"):
            llm_accel.apply(model, method)
    monkeypatch.undo()
    layer = type(model.get_decoder().layers[0])
    plain = layer.forward

    def hinted(self: Any, hidden_states: torch.Tensor, hints: torch.Tensor | None = None, **kwargs: Any) -> Any:
        return plain(self, hidden_states, **kwargs)

    monkeypatch.setattr(layer, "forward", hinted)
    with pytest.raises(UnsupportedModelError, match="takes rows out between two layers, but those of aya_vision also"):
        llm_accel.apply(model, "dyvte")
    llm_accel.apply(model, "stride_tokens").remove()
    assert decoder is type(model.get_decoder())


def test_features_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each image ends is told from the pixels, or the call is refused."""
    model = built("aya_vision")
    batch, original = scene(model), type(model.base_model).get_image_features
    rows = {"kept": 4}

    @functools.wraps(original)
    def joined(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        output.pooler_output = torch.cat(list(output.pooler_output))[: rows["kept"]]
        return output

    two = torch.cat([batch["pixel_values"], batch["pixel_values"] + 1])
    with llm_accel.apply(model, "stride_tokens", budget=1):
        separate = model.base_model.get_image_features(two, return_dict=True).pooler_output
        monkeypatch.setattr(type(model.base_model), "get_image_features", joined)
        rows["kept"] = 8
        together = model.base_model.get_image_features(two, return_dict=True).pooler_output
        assert torch.equal(together[:, -1].isnan(), torch.cat(list(separate))[:, -1].isnan())
        rows["kept"] = 7
        with pytest.raises(UnsupportedCallError, match="without saying where each ends"):
            model.base_model.get_image_features(two, return_dict=True)
