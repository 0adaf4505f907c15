"""RetrievalHeads: options, the choice of heads from scores, and what profiles may look like."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from llm_accel import ConfigError, RetrievalHeads
from llm_accel.methods import HeadProfile, ModelHeads, load_profile
from llm_accel.registry import parse

MODEL = ModelHeads(layers=3, query_heads=4, kv_heads=2, eligible=(0, 1, 2))
SCORES = ((0.0, 0.9, 0.05, 0.05), (0.2, 0.0, 0.0, 0.0), (0.0, 0.0, 0.9, 0.3))
KV = ((0.9, 0.05), (0.2, 0.0), (0.0, 0.9))


def profile(**changes: Any) -> HeadProfile:
    return HeadProfile(
        **({"model": "m", "method": "copy_paste", "q_head_scores": SCORES, "kv_head_scores": KV} | changes)
    )


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("sinks=-1", "at least 0"),
        ("recent=0", "at least 1"),
        ("full=1.5", r"in \[0, 1\]"),
        ("mode=mask,k=-1", "at least 0"),
        ("mode=mask,full=0.5", "full belong to mode=stream"),
        ("k=4", "k belong to mode=mask"),
        ("head_list=3", "layer.head"),
        ("head_list=0.1,full=0.5", "leave heads, full, k and control out"),
        ("full_budget=8", "above 32"),
        ("skip_layers=0+0", "distinct"),
        ("mode=mask,control=other", "'random' or 'random_excluding_circuit'"),
    ],
)
def test_options_that_cannot_work(spec: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        parse(f"retrieval_heads:{spec}")


def test_text_form_round_trip() -> None:
    config = RetrievalHeads(mode="mask", mask_mode="window", phase="all", head_list=("0.1", "2.3"), sinks=2, recent=5)
    assert parse(config.spec()) == config
    config = RetrievalHeads(heads="runs/heads.json", full=0.25, prefill="lambda", full_budget=64)
    assert parse(config.spec()) == config


@pytest.mark.parametrize(
    ("share", "full"),
    [
        (None, ((0,), (0,), (1,))),  # three of six KV heads have a score of at least 0.1
        (0.0, ((), (), ())),
        (1 / 6, ((0,), (), ())),  # of two with 0.9 the earlier layer
        (1 / 3, ((0,), (), (1,))),
        (1.0, ((0, 1), (0, 1), (0, 1))),
    ],
)
def test_best_kv_heads_of_the_whole_model_keep_everything(share: float | None, full: Any) -> None:
    assert RetrievalHeads(full=share).split(MODEL, profile()).full == full


def test_layers_that_do_not_count_are_left_out_of_the_share() -> None:
    model = dataclasses.replace(MODEL, eligible=(1, 2))
    assert RetrievalHeads(full=0.5).split(model, profile()).full == ((), (0,), (1,))


def test_shares_recommended_by_detectors() -> None:
    every = range(3)
    assert profile(kv_head_scores=((0.0, 0.0),) * 3).full_share(every) == 0.25
    assert profile(method="induction").full_share(every) == 0.35
    assert profile(method="induction", kv_head_scores=SCORES).full_share(every) == 0.15
    assert profile(method="gates").full_share(every) == 0.5
    assert profile(method="gates", kv_head_scores=SCORES).full_share(every) == 0.25


def test_a_share_of_the_data_free_heads_goes_by_echo() -> None:
    scores = tuple((0.9, 0.8) for _ in range(15))
    echo = tuple((0.0, float(layer == 14)) for layer in range(15))
    kept = profile(q_head_scores=scores, kv_head_scores=scores, echo_scores=echo, method="induction")
    chosen = kept.full_heads(0.5, range(15))
    assert len(chosen) == 15
    assert (14, 1) in chosen
    assert sum(head == 1 for _, head in chosen) == 1


def test_masked_heads_are_the_best_and_controls_are_others() -> None:
    def masked(**options: Any) -> list[tuple[int, int]]:
        heads = RetrievalHeads(mode="mask", **options).mask(MODEL, profile(circuit=((0, 0), (1, 1)))).heads
        return [(layer, head) for layer, row in enumerate(heads) for head in row]

    detected = [(0, 1), (1, 0), (2, 2), (2, 3)]
    assert masked() == detected
    assert masked(k=1) == [(0, 1)]
    for seed in range(20):
        control = masked(control="random", seed=seed)
        assert len(control) == 4
        assert not set(control) & set(detected)
        assert masked(control="random", seed=seed) == control
        careful = masked(control="random_excluding_circuit", seed=seed)
        assert not set(careful) & {*detected, (0, 0), (1, 1)}
    assert masked(control="random", seed=1) != masked(control="random", seed=2)
    with pytest.raises(ConfigError, match="draws 9 of 3 heads"):
        masked(k=9, control="random")


def test_a_control_without_a_known_circuit_is_refused() -> None:
    config = RetrievalHeads(mode="mask", control="random_excluding_circuit")
    with pytest.raises(ConfigError, match="--circuit"):
        config.mask(MODEL, profile())


def test_listed_heads_must_exist() -> None:
    with pytest.raises(ConfigError, match="layers 0 to 2 and KV heads 0 to 1"):
        RetrievalHeads(head_list=("0.2",)).split(MODEL, None)
    with pytest.raises(ConfigError, match="query heads 0 to 3"):
        RetrievalHeads(mode="mask", head_list=("3.0",)).mask(MODEL, None)


def test_profiles_survive_the_file(tmp_path: Path) -> None:
    one = profile(circuit=((0, 1),), echo_scores=KV, versions={"torch": "x", "triton": None}, settings={"tokens": 4})
    one.save(tmp_path / "heads.json")
    assert load_profile(tmp_path / "heads.json") == load_profile(tmp_path) == one


def test_duo_attention_patterns(tmp_path: Path) -> None:
    (tmp_path / "full_attention_heads.tsv").write_text("1.0\t0.5\n0.5\t0.5\n0.25\t1.0\n")
    loaded = load_profile(tmp_path, query_heads=4)
    assert loaded.shape == (3, 4, 2)
    assert loaded.q_head_scores[0] == (1.0, 1.0, 0.5, 0.5)
    loaded.check(3, 4, 2)
    assert loaded.full_heads(0.5, range(3)) == [(0, 0), (2, 1), (0, 1)]  # equal gates: the earlier layer and head


@pytest.mark.parametrize("text", ["", "{}", "[1, 2]", "1\t2\n3\n", "a\tb\n", '{"q_head_scores": [[NaN]]}', "nan\n"])
def test_files_that_are_no_profiles(tmp_path: Path, text: str) -> None:
    (tmp_path / "x").write_text(text)
    with pytest.raises(ConfigError, match="is no head profile"):
        load_profile(tmp_path / "x")


def test_a_missing_file_and_a_wrong_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_profile(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="3 layers, 4 query heads and 2 KV heads; the model has 3, 8 and 2"):
        profile().check(3, 8, 2)
