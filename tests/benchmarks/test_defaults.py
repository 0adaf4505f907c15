"""The measurement behind SnapKV's default: a replayed setting does what the plug-in does, and the rule what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import llm_accel
from benchmarks.defaults.__main__ import candidates, fits
from benchmarks.defaults.measure import Prober
from benchmarks.defaults.prompts import FAMILIES, Case, make_case
from benchmarks.defaults.summary import choice, summarize, winner
from llm_accel import AdaKV, PyramidKV, SnapKV
from llm_accel.common.bundled import load_needle_model
from llm_accel.eval.prompts.encoding import Encoder, make_frame

SETTINGS = [
    SnapKV(ratio=0.125),
    SnapKV(ratio=0.125, kernel=7),
    SnapKV(ratio=0.07, kernel=63),
    SnapKV(ratio=0.125, pool="avg"),
    AdaKV(ratio=0.125),
    PyramidKV(ratio=0.125),
]


@pytest.fixture(scope="module")
def prober() -> Prober:
    return Prober(*load_needle_model())


def case_of(prober: Prober, sample: int) -> Case:
    encoder = Encoder(prober.tokenizer)
    return make_case("choose", FAMILIES["choose"][0], 512, sample, encoder, make_frame(encoder, None))


@pytest.mark.parametrize("sample", [0, 1])
def test_a_replayed_setting_answers_as_the_plug_in_does(prober: Prober, sample: int) -> None:
    case = case_of(prober, sample)
    answer = prober.dense_answer(case)
    assert answer is not None and case.value in prober.text(answer)
    verdicts = prober.verdicts(answer, SETTINGS)
    assert True in verdicts
    model, _ = load_needle_model()  # with an attention function of its own
    ids = torch.tensor([case.ids])
    for setting, right in zip(SETTINGS, verdicts, strict=True):
        with llm_accel.apply(model, setting):
            made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(answer), do_sample=False)
        tokens = made[0, ids.shape[1] :].tolist()
        same = tokens[: len(answer) - 1] == answer[:-1] and not prober.goes_on(tokens[-1])
        assert same == right, setting.spec()


def test_a_dense_answer_without_the_value_does_not_count(prober: Prober) -> None:
    case = case_of(prober, 0)
    assert prober.dense_answer(Case(case.ids, "not there")) is None


def test_halves_share_no_wording(prober: Prober) -> None:
    words = [{(f.hidden, f.question) for f in FAMILIES[half]} for half in ("choose", "confirm")]
    shared = words[0] & words[1]
    assert all(f.value.__name__ != "_number" for f in FAMILIES["confirm"] if (f.hidden, f.question) in shared)
    encoder = Encoder(prober.tokenizer)
    frame = make_frame(encoder, None)
    family = FAMILIES["choose"][0]
    assert make_case("choose", family, 512, 0, encoder, frame) == make_case("choose", family, 512, 0, encoder, frame)
    assert make_case("choose", family, 512, 0, encoder, frame) != make_case("choose", family, 512, 1, encoder, frame)


def test_shares_too_small_for_the_window_are_left_out() -> None:
    assert not any(fits(setting, 512) for setting in candidates(1 / 16))
    assert all(fits(setting, 1024) for setting in candidates(1 / 16))


def records(**right: bool) -> list[dict[str, Any]]:
    shared = {"model": "m", "dtype": "bfloat16", "half": "choose", "family": "number", "length": 1024}
    specs = {"snapkv:ratio=0.25" + (f",kernel={k}" if k != "auto" else ""): ok for k, ok in right.items()}
    return [shared | {"sample": 0, "right": {s.replace("k7", "7").replace("k15", "15"): r for s, r in specs.items()}}]


def test_the_rule() -> None:
    assert winner({"auto": 0.90, "7": 0.2, "15": 0.88}) == "auto"
    assert winner({"auto": 0.90, "7": 0.2, "15": 0.895}) == "15"  # too close: the fixed width wins
    assert winner({}) is None
    assert choice(records(auto=True, k7=False, k15=True)) == {"auto": 1.0, "7": 0.0, "15": 1.0}
    found = summarize([*records(auto=True, k7=False), {**records(auto=True)[0], "right": None, "sample": 1}])
    assert found["chosen"] == "auto"
    (table,) = found["tables"]
    assert table["dense"] == {"number": [1, 2]}
    assert table["kept"]["snapkv:ratio=0.25"]["families"] == {"number": [1, 1]}
