"""DyVTE's routers: which layer they choose, for whom, and that what follows equals hidden keys behind that layer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

import llm_accel
from llm_accel import ConfigError, DyVTE
from llm_accel.methods import Routers, load_routers
from llm_accel.methods.visual.routers import RouterInfo, text_features
from llm_accel.patches.identity import config_hash, weight_hash
from tests.tiny_vlm import IMAGE, ONE, UNEQUAL, Scene, decode, inputs, tiny_vlm
from tests.vision_oracle import hidden

EXACT = 2e-4
WIDTH = 64  # two times the channels of the tiny models


def info(model: PreTrainedModel) -> RouterInfo:
    return RouterInfo("tiny", 3, 32, config_hash(model), weight_hash(model))


def fixed(model: PreTrainedModel, folder: Path, exits: Sequence[bool]) -> str:
    """Routers that always say the same: GELU(x) + GELU(-x) is above zero, and a tie keeps."""
    first = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(0))
    both = torch.cat([first, -first])
    weights = {k: (both.clone(), torch.tensor([[0.0, 0.0], [1.0, 1.0]]) * leave) for k, leave in enumerate(exits)}
    Routers(info(model), weights).save(folder / "routers.safetensors")
    return str(folder)


def chosen(model: PreTrainedModel, routers: Routers, rows: Sequence[dict[str, torch.Tensor]]) -> int | None:
    """The first layer whose router says exit for every prompt, from the hidden states of the unpatched model."""
    for layer in routers.weights:
        votes = []
        for row in rows:
            states = model(**row, output_hidden_states=True, use_cache=False).hidden_states[layer + 1][0]
            behind = states[int((row["input_ids"][0] == IMAGE).nonzero()[-1]) + 1 :].double()
            first, last = (weight.double() for weight in routers.weights[layer])
            looked = torch.cat([behind[:-1].mean(0), behind[-1]])
            keep, leave = last @ torch.nn.functional.gelu(first @ looked)
            votes.append(bool(leave > keep))
        if all(votes):
            return layer
    return None


def test_random_routers_choose_what_they_say(tmp_path: Path) -> None:
    """Alone and together, several seeds: the layer is that of the definition, and generation equals hidden keys."""
    model, seen = tiny_vlm(), set()
    alone = [inputs(model, [scene]) for scene in UNEQUAL]
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        weights = {
            layer: (torch.randn(8, WIDTH, generator=generator), torch.randn(2, 8, generator=generator))
            for layer in (0, 1)
        }
        routers = Routers(info(model), weights)
        routers.save(tmp_path / "routers.safetensors")
        for rows, batch in [([one], one) for one in alone] + [(alone, inputs(model, UNEQUAL))]:
            wanted = chosen(model, routers, rows)
            seen.add(wanted)
            with llm_accel.apply(model, "dyvte", routers=str(tmp_path)) as handle:
                logits = decode(model, batch, max_new_tokens=2)[1]
                assert handle.report().exit_layer == wanted
            for one, row in zip(logits, rows, strict=True):
                behind, visual = 2 if wanted is None else wanted, row["input_ids"][0] == IMAGE
                assert torch.allclose(one, hidden(model, row, visual, behind, steps=2), atol=EXACT)
    assert seen == {None, 0, 1}


def test_all_or_none_say_exit(tmp_path: Path) -> None:
    """All: behind layer 0, once, in the prompt. None: bit for bit the unpatched model, decoding included."""
    model = tiny_vlm()
    batch = inputs(model, UNEQUAL)
    dense = decode(model, batch)[1]
    with llm_accel.apply(model, "dyvte", routers=fixed(model, tmp_path, [True, True])) as handle:
        decode(model, batch)
        report = handle.report()
    assert report.exit_layer == 0 and report.backends["exit"][0] == "routers"
    lengths = [layer.physical_length for layer in report.layers]
    texts = max(sum(scene.text) for scene in UNEQUAL) + 5
    assert lengths == [batch["input_ids"].shape[1] + 5, texts, texts]
    with llm_accel.apply(model, "dyvte", routers=fixed(model, tmp_path, [False, False])) as handle:
        assert torch.equal(decode(model, batch)[1], dense)
        assert handle.report().exit_layer is None


def test_who_votes(tmp_path: Path) -> None:
    """A row without an image does not; one with an image and a single word behind it keeps everybody's."""
    model = tiny_vlm()
    alone = inputs(model, ONE)
    exits = {layer: hidden(model, alone, alone["input_ids"][0] == IMAGE, layer) for layer in (1, 2)}
    with llm_accel.apply(model, "dyvte", routers=fixed(model, tmp_path, [False, True])) as handle:
        for other, layer in [(Scene((20,)), 1), (Scene((5, 0), 2), None), (Scene((5, 1), 2), None)]:
            logits = decode(model, inputs(model, [*ONE, other]))[1]
            assert handle.report().exit_layer == layer
            assert torch.allclose(logits[0], exits[layer or 2], atol=EXACT)


def test_second_turn_and_beams(tmp_path: Path) -> None:
    """Each turn with an image is decided on its own; entries of earlier turns stay as they are."""
    model = tiny_vlm()
    first, later = inputs(model, ONE), inputs(model, [Scene((3, 4), 7)])
    with llm_accel.apply(model, "dyvte", routers=fixed(model, tmp_path, [False, True])) as handle:
        cache = handle.new_cache()
        answer, _ = decode(model, first, past_key_values=cache)
        ids = torch.cat([first["input_ids"], answer, later["input_ids"]], dim=1)
        both = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        second = decode(model, both | {"pixel_values": later["pixel_values"]}, past_key_values=cache)
        whole = both | {"pixel_values": torch.cat([first["pixel_values"], later["pixel_values"]])}
        assert torch.allclose(second[1], decode(model, whole)[1], atol=EXACT)
        beams = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False}
        routed = model.generate(**first, **beams)
    with llm_accel.apply(model, "dyvte", exit=1):
        assert torch.equal(model.generate(**first, **beams), routed)


def test_features_are_the_text_behind_the_image() -> None:
    rows = torch.arange(24.0).view(2, 6, 2)
    visual = torch.tensor([[0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0]]).bool()
    real = torch.tensor([[1] * 6, [0] + [1] * 5]).bool()
    features, ready = text_features(rows, visual, real)
    assert ready.tolist() == [True, False]
    assert features[0].tolist() == [7.0, 8.0, 10.0, 11.0]
    assert features[1].tolist() == [0.0, 0.0, 22.0, 23.0]


def test_files(tmp_path: Path) -> None:
    """What is written is what is read; routers of another model or of other sizes are refused before anything is
    touched."""
    model = tiny_vlm()
    folder = fixed(model, tmp_path, [True, False])
    routers = load_routers(folder)
    assert routers.info == info(model) and list(routers.weights) == [0, 1]
    assert torch.equal(routers.weights[0][1], torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    for other, words in [(tiny_vlm(seed=1), "other weights"), (tiny_vlm("internvl"), "other weights")]:
        with pytest.raises(ConfigError, match=words):
            llm_accel.apply(other, "dyvte", routers=folder)
    cases = [
        (RouterInfo("tiny", 3, 16, "", ""), 32, r"3 layers of 16 channels \('tiny'\); llava has 3 of 32"),
        (RouterInfo("tiny", 5, 32, "", ""), 64, r"5 layers of 32 channels"),
        (info(model), 32, r"shapes \[8, 32\] and \[2, 8\]; \[r, 64\]"),
    ]
    for about, width, words in cases:
        Routers(about, {0: (torch.zeros(8, width), torch.zeros(2, 8))}).save(tmp_path / "other.safetensors")
        with pytest.raises(ConfigError, match=words):
            llm_accel.apply(model, "dyvte", routers=str(tmp_path / "other.safetensors"))
    save_file({"x": torch.zeros(1)}, tmp_path / "plain.safetensors")
    for name in ("plain.safetensors", "missing.safetensors"):
        with pytest.raises(ConfigError, match="llm-accel calibrate dyvte"):
            llm_accel.apply(model, "dyvte", routers=str(tmp_path / name))


def test_features_that_come_later_than_the_cut(tmp_path: Path) -> None:
    """Qwen3-VL adds features behind layer 0: its router is not asked."""
    model = tiny_vlm("qwen3_vl")
    folder = fixed(model, tmp_path, [True, True])
    with llm_accel.apply(model, "dyvte", routers=folder) as handle:
        decode(model, inputs(model, ONE))
        assert handle.report().exit_layer == 1


def test_copies_keep_their_routers(tmp_path: Path) -> None:
    model = tiny_vlm()
    batch = inputs(model, ONE)
    with llm_accel.apply(model, DyVTE(routers=fixed(model, tmp_path, [False, True]))):
        ours, twin = decode(model, batch)[1], copy.deepcopy(model)
    (tmp_path / "routers.safetensors").unlink()
    assert torch.equal(decode(twin, batch)[1], ours)
