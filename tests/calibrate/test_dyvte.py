"""The calibration of DyVTE: labels against brute force, the calibrated layer, routers, and runs that stopped."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import llm_accel
from llm_accel import AlreadyAppliedError, ConfigError, DyVTE, UnsupportedModelError
from llm_accel.calibrate.dyvte import calibrate_dyvte, train
from llm_accel.calibrate.dyvte.observe import observe, safe_exits
from llm_accel.calibrate.dyvte.train import router_votes, train_routers
from llm_accel.methods import load_exit_profile, load_routers
from llm_accel.methods.visual.exit_profile import at_most, calibrated_exit, samples_needed
from llm_accel.patches.families import FAMILIES
from tests.tiny import tiny_model
from tests.tiny_vlm import IMAGE, Scene, decode, inputs, tiny_vlm
from tests.vision_oracle import decoder_inputs, hiding


@pytest.mark.parametrize(("family", "first"), [("llava", 0), ("qwen2_vl", 0), ("qwen3_vl", 1)])
@torch.no_grad()
def test_every_exit_equals_hidden_keys(family: str, first: int) -> None:
    """Two images, teacher forcing: losses, agreement and features of all layers from one pass."""
    model = tiny_vlm(family)
    sample, answer = inputs(model, [Scene((3, 2, 7), 4)]), torch.tensor([5, 17, 17, 60])
    seen = observe(model, sample, answer, FAMILIES[family])
    whole = inputs(model, [Scene((3, 2, 7), 4)])
    whole["input_ids"] = torch.cat([whole["input_ids"], answer[None]], dim=1)
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    if "mm_token_type_ids" in whole:
        whole["mm_token_type_ids"] = (whole["input_ids"] == IMAGE).int()
    visual, given = whole["input_ids"][0] == IMAGE, decoder_inputs(model, whole)
    full = model(**whole, use_cache=False).logits[0, -5:-1]
    assert abs(seen.loss - float(F.cross_entropy(full, answer))) < 1e-5
    assert len(seen.losses) == len(seen.agreement) == len(seen.features) == 2 - first
    states = model(**sample, output_hidden_states=True, use_cache=False).hidden_states  # without the answer
    behind = int(visual.nonzero()[-1]) + 1
    for place, layer in enumerate(range(first, 2)):
        with hiding(model, visual, layer):
            output = model.get_decoder()(**given, attention_mask=torch.ones(1, len(visual)).long(), use_cache=False)
        logits = model.lm_head(output.last_hidden_state)[0, -5:-1]
        assert abs(seen.losses[place] - float(F.cross_entropy(logits, answer))) < 1e-4
        assert seen.agreement[place] == float((logits.argmax(-1) == full.argmax(-1)).float().mean())
        text = states[layer + 1][0, behind:]
        assert torch.allclose(seen.features[place], torch.cat([text[:-1].mean(0), text[-1]]), atol=1e-4)
    assert len(model.get_decoder().layers) == 3


def test_agreement_is_what_generation_does() -> None:
    """An own answer stays the most likely one exactly where the plug-in with that exit writes it."""
    model, seen = tiny_vlm(), set()
    for seed in range(5):
        batch = inputs(model, [Scene((3, 8), seed)])
        answer = decode(model, batch, max_new_tokens=2)[0][0]
        agreement = observe(model, batch, answer, FAMILIES["llava"]).agreement
        for layer in (0, 1):
            with llm_accel.apply(model, "dyvte", exit=layer):
                same = torch.equal(decode(model, batch, max_new_tokens=2)[0][0], answer)
            assert same == (agreement[layer] == 1.0)
            seen.add(same)
    assert seen == {True, False}


def test_labels() -> None:
    """A loss 1.031 times as large is no safe exit, and neither is one token of a short answer that changes."""
    assert safe_exits(2.0, (2.062, 2.058, 1.0, 2.0), (1.0, 1.0, 1.0, 0.99)) == (False, True, True, False)
    assert safe_exits(0.0, (0.0, 1e-9), (1.0, 1.0)) == (True, False)
    assert safe_exits(0.1, (0.109, 0.111), (1.0, 1.0), slack=0.01) == (True, False)


@pytest.mark.parametrize(
    ("changed", "first", "epsilon", "layer"),
    [
        ((1.0, 0.0, 0.1, 0.0, 0.02), 0, 0.02, 3),
        ((1.0, 0.0, 0.1, 0.0, 0.02), 0, 0.1, 1),
        ((0.0, 0.0), 2, 0.0, 2),
        ((0.0, 0.5), 0, 0.02, 2),
    ],
)
def test_the_calibrated_layer_and_all_behind_it_are_safe(
    changed: tuple[float, ...], first: int, epsilon: float, layer: int
) -> None:
    assert calibrated_exit(changed, first, epsilon) == layer


@pytest.mark.parametrize(("changed", "samples"), [(0, 16), (0, 149), (1, 256), (3, 60), (15, 16)])
def test_the_bound_on_what_changes(changed: int, samples: int) -> None:
    """At the bound, so few changes or fewer have a probability of one in twenty: drawn, not computed."""
    bound = at_most(changed, samples, 0.95)
    drawn = np.random.default_rng(0).binomial(samples, bound, 200_000)
    assert (drawn <= changed).mean() == pytest.approx(0.05, abs=0.003)
    assert at_most(changed, samples, 0.99) > bound > changed / samples


def test_few_samples_prove_little() -> None:
    """16 of 16 happen in half of all runs of a model that changes 4 %, so they cannot say 2 %."""
    assert at_most(0, 16, 0.95) > 0.17 and at_most(16, 16, 0.95) == 1.0
    assert at_most(0, 148, 0.95) > 0.02 >= at_most(0, 149, 0.95) and samples_needed(0.02, 0.95) == 149
    assert samples_needed(0.0, 0.95) is None


def test_the_bound_decides_and_is_recorded(tmp_path: Path) -> None:
    """A layer that is safe for every one of a few samples is no exit; with a wider limit it is."""
    model = tiny_vlm()
    batch = inputs(model, [Scene()])
    options = {"max_new_tokens": 2, "slack": 1e3, "routers": False, "name": "tiny"}
    samples = [(batch, [int(model(**batch).logits[0, -1].argmax())])] * 3
    found = calibrate_dyvte(model, samples, **options, epsilon=0.7)
    assert {one.changed_at_most for one in found.profile.per_layer} <= {round(at_most(k, 3, 0.95), 6) for k in range(4)}
    strict = calibrate_dyvte(model, samples, **options)
    assert strict.profile.exit == 2 and strict.profile.confidence == 0.95
    for one in found.profile.per_layer:
        assert one.changed_at_most == round(at_most(round(3 * (1 - one.safe_rate)), 3, 0.95), 6)


def test_routers_learn_what_can_be_learned() -> None:
    """Layer 0: the sign of one channel beside another of a thousand times its size; layer 1: nothing is safe."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 2, 6, generator=generator) * torch.tensor([1, 1000, 1, 1, 0.1, 1])
    safe = torch.stack([features[:, 0, 0] > 0, torch.zeros(200).bool()], dim=1)
    trained = train_routers(features, safe, [3, 4], 16, seed=7)
    learned, empty = trained.scores
    assert learned.layer == 3 and learned.precision is not None and learned.recall is not None
    assert min(learned.precision, learned.recall) > 0.9
    assert (empty.exits, empty.precision, empty.recall) == (0.0, None, None)
    assert torch.equal(router_votes(trained.weights[3], features[4::5, 0]).float().mean(), torch.tensor(learned.exits))
    again = train_routers(features, safe, [3, 4], 16, seed=7).weights
    assert all(torch.equal(a, b) for k in (3, 4) for a, b in zip(trained.weights[k], again[k], strict=True))
    assert trained.routed is not None and trained.routed[1] == pytest.approx(5 - 2 * learned.exits)


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "STEPS", 5)


def test_a_run_goes_on_where_it_stopped(few_steps: None, tmp_path: Path) -> None:
    """Own answers and given ones; the same files to the byte, and the model that they are for runs with them."""
    model = tiny_vlm()
    samples = [(inputs(model, [Scene((4, 9), seed)]), [7, 9] if seed == 2 else None) for seed in range(6)]
    options = {"router_dim": 4, "max_new_tokens": 3, "epsilon": 0.99, "name": "tiny"}
    found = calibrate_dyvte(model, samples, **options, out=tmp_path / "whole")
    calibrate_dyvte(model, iter(samples), num_samples=4, **options, out=tmp_path / "parts")
    (tmp_path / "parts" / "features" / "000001.safetensors").unlink()
    lines = (tmp_path / "parts" / "cells.jsonl").read_text().splitlines()
    (tmp_path / "parts" / "cells.jsonl").write_text("\n".join([*lines[:3], lines[3][:20]]))
    calibrate_dyvte(model, samples, **options, out=tmp_path / "parts")
    for name in ("dyvte.json", "routers.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    with pytest.raises(ConfigError, match=r"sample 0: .* holds another sample"):
        calibrate_dyvte(model, samples[1:], **options, out=tmp_path / "parts")
    with pytest.raises(ConfigError, match="other settings"):
        calibrate_dyvte(model, samples, **options | {"max_new_tokens": 4}, out=tmp_path / "parts")
    profile = load_exit_profile(tmp_path / "whole")
    assert profile == found.profile and profile.samples == 6 and len(profile.routers) == 2
    assert profile.settings["answers_given"] == 1
    assert load_routers(tmp_path / "whole").info.samples == 6
    with llm_accel.apply(model, "dyvte", routers=str(tmp_path / "whole")) as handle:
        assert handle.report().backends["exit"] == ("routers", "trained on 6 samples")
    again = calibrate_dyvte(model, samples, **options, routers=False)
    assert again.profile.per_layer == profile.per_layer and again.routers is None


@pytest.mark.parametrize(("layer", "before", "text"), [(1, 1, "layer 1"), (2, None, "no layer was safe")])
def test_a_calibrated_exit(tmp_path: Path, layer: int, before: int | None, text: str) -> None:
    model = tiny_vlm()
    batch = inputs(model, [Scene()])
    found = calibrate_dyvte(model, [batch], max_new_tokens=2, routers=False, name="tiny")
    data = json.loads(_saved(found.profile, tmp_path).read_text()) | {"exit": layer}
    (tmp_path / "dyvte.json").write_text(json.dumps(data))
    for method in (DyVTE(calibration=str(tmp_path)), DyVTE(exit="calibrated", calibration=str(tmp_path))):
        with llm_accel.apply(model, method) as handle:
            decode(model, batch)
            report = handle.report()
        assert report.exit_layer == before
        assert report.backends["exit"] == (text, "calibrated on 1 samples with these weights")
    with llm_accel.apply(tiny_vlm(seed=1), "dyvte", calibration=str(tmp_path)) as handle:
        assert handle.report().backends["exit"][1].endswith("with other weights than these (tiny)")
    (tmp_path / "dyvte.json").write_text(json.dumps(data | {"layers": 5}))
    with pytest.raises(ConfigError, match="one of 5 layers; llava has 3"):
        llm_accel.apply(model, "dyvte", calibration=str(tmp_path))


def _saved(profile: object, folder: Path) -> Path:
    profile.save(folder / "dyvte.json")
    return folder / "dyvte.json"


def test_without_a_file() -> None:
    """Calibrated is an error that tells what to do; nothing given is a fixed layer, and the report says so."""
    model = tiny_vlm()
    with pytest.raises(
        ConfigError, match=r"llm-accel calibrate dyvte.*0\.6 is a choice that was validated on no model"
    ):
        llm_accel.apply(model, "dyvte", exit="calibrated")
    with llm_accel.apply(model, "dyvte") as handle:
        assert handle.report().backends["exit"][1].startswith("validated on no model")
    with pytest.raises(ConfigError, match="cannot be read as an exit calibration"):
        llm_accel.apply(model, "dyvte", calibration="missing.json")


def test_what_cannot_be_calibrated() -> None:
    model = tiny_vlm()
    batch = inputs(model, [Scene()])
    cases = [
        ([], {}, "there is no sample"),
        ([inputs(model, [Scene((9,))])], {}, "sample 0: it has no image"),
        ([batch, inputs(model, [Scene((9, 1))])], {}, "sample 1: fewer than two text tokens"),
        ([(batch, [])], {}, "its answer has no token"),
        ([inputs(model, [Scene(), Scene((2, 6), 6)])], {}, "give one row per sample"),
        ([batch], {"num_samples": 0}, "num_samples=0"),
        ([batch], {"epsilon": 1.0}, "epsilon=1.0"),
        ([batch], {"confidence": 1.0}, "confidence=1.0"),
        ([batch], {"slack": -1.0}, "slack=-1.0"),
    ]
    for samples, options, words in cases:
        with pytest.raises(ConfigError, match=words):
            calibrate_dyvte(model, samples, max_new_tokens=2, **options)
    with pytest.raises(UnsupportedModelError, match="sees no images"):
        calibrate_dyvte(tiny_model("llama"), [batch])
    with llm_accel.apply(model, "dyvte", exit=0), pytest.raises(AlreadyAppliedError):
        calibrate_dyvte(model, [batch])
