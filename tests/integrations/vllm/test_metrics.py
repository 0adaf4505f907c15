"""The stat-logger plug-in without a server: what it shows of an engine with a KV method, and that it is silent for all
others. Skipped where vLLM is not installed."""

from __future__ import annotations

import importlib.util
import tempfile
from types import SimpleNamespace

import pytest

from llm_accel.integrations.vllm.counters import Counters

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]
STEP = SimpleNamespace(num_running_reqs=3)


def config(method: str | None):
    text = SimpleNamespace(num_hidden_layers=5)
    overrides = {} if method is None else {"llm_accel": {"method": method}}
    model = SimpleNamespace(
        hf_overrides=overrides, hf_config=SimpleNamespace(), hf_text_config=text, served_model_name="m"
    )
    return SimpleNamespace(model_config=model, parallel_config=SimpleNamespace(tensor_parallel_size=2))


def shown() -> dict[tuple[str, str], float]:
    from prometheus_client import REGISTRY

    return {
        (sample.name, sample.labels["method"]): sample.value
        for family in REGISTRY.collect()
        for sample in family.samples
        if sample.name.startswith("llm_accel:")
    }


def test_vllm_finds_the_plug_in_and_takes_it():
    from vllm.v1.metrics.loggers import load_stat_logger_plugin_factories

    from llm_accel.integrations.vllm.metrics import FreedBlocks

    assert FreedBlocks in load_stat_logger_plugin_factories()


@pytest.mark.parametrize("method", [None, "flowcut"])
def test_engines_without_a_kv_method_have_no_metrics_of_ours(method):
    from llm_accel.integrations.vllm.metrics import FreedBlocks

    before = shown()
    made = FreedBlocks(config(method))
    made.log_engine_initialized()
    made.record(STEP, None, mm_cache_stats=None, engine_idx=0)
    assert shown() == before


def test_what_was_freed_is_shown_once_there_is_something(tmp_path, monkeypatch):
    from llm_accel.integrations.vllm.metrics import FreedBlocks

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    method = "snapkv:budget=777"
    made = FreedBlocks(config(method), 1)
    made.record(None, None)
    made.record(STEP, None)
    assert shown()["llm_accel:requests_running", method] == 3
    assert shown()["llm_accel:kv_blocks_freed", method] == 0
    counters = Counters(1)
    counters.add(4, 1024)
    made.record(STEP, None)
    counters.add(2, 1024)
    made.record(STEP, None)
    assert shown()["llm_accel:kv_blocks_freed", method] == 6
    assert shown()["llm_accel:kv_bytes_freed", method] == 6 * 1024 * 5 * 2  # layers, workers
    FreedBlocks(config(method), 1)  # another engine of this process
