"""The report: sums, plain data, and the card."""

from __future__ import annotations

import json

import pytest
import torch

from llm_accel.report import LayerReport, Report

MIB = 2**20


@pytest.fixture
def report() -> Report:
    ours = {
        "logical_length": 4096,
        "physical_length": 128,
        "kv_bytes": MIB,
        "dense_kv_bytes": 32 * MIB,
        "evicted": 3968,
    }
    sliding = {"logical_length": 4096, "physical_length": 512, "kv_bytes": 4 * MIB, "dense_kv_bytes": 4 * MIB}
    return Report(
        method="snapkv:budget=128",
        backends={"scores": ("torch", "no CUDA device")},
        layers=[
            LayerReport(0, **ours, kept=torch.tensor([[[-1, 3, 4095]]])),
            LayerReport(1, **sliding, skipped_reason="sliding window of 512 tokens"),
            LayerReport(2, **ours),
            LayerReport(3, **sliding, skipped_reason="sliding window of 512 tokens"),
        ],
        warnings=["one thing to know"],
    )


def test_bytes_are_sums_over_all_layers(report: Report):
    assert report.kv_bytes == 10 * MIB
    assert report.dense_kv_bytes == 72 * MIB


def test_plain_data_is_json_and_complete(report: Report):
    data = json.loads(json.dumps(report.to_dict()))
    assert data["kv_bytes"] == report.kv_bytes and data["dense_kv_bytes"] == report.dense_kv_bytes
    assert data["layers"][0]["kept"] == [[[-1, 3, 4095]]] and data["layers"][1]["kept"] is None
    assert data["layers"][1]["skipped_reason"] == "sliding window of 512 tokens"
    assert data["backends"]["scores"] == ["torch", "no CUDA device"]
    names = {"method", "backends", "layers", "kv_bytes", "dense_kv_bytes", "warnings"}
    assert names | {"visual_tokens_before", "visual_tokens_after", "exit_layer", "chosen"} == set(data)


def test_plain_data_is_a_copy(report: Report):
    report.to_dict()["layers"].clear()
    report.to_dict()["warnings"].clear()
    assert len(report.layers) == 4 and report.warnings


def test_the_card_says_what_was_saved_skipped_and_why(report: Report):
    card = str(report)
    for part in (
        "llm_accel snapkv:budget=128",
        "10.00 MiB instead of 72.00 MiB (13.9% of dense)",
        "128 stored of 4096 seen, in 2 of 4 layers",
        "layers 1, 3: sliding window of 512 tokens",
        "torch (no CUDA device)",
        "one thing to know",
    ):
        assert part in card, card


def test_the_card_before_the_first_call():
    assert str(Report(method="snapkv")) == "llm_accel snapkv\n  no call yet"


def test_the_card_with_nothing_stored_and_with_every_layer_skipped():
    assert "0.00 MiB instead of 0.00 MiB" in str(Report(method="snapkv", layers=[LayerReport(0)]))
    assert "entries" not in str(Report(method="snapkv", layers=[LayerReport(0, skipped_reason="no cache")]))
