"""The metrics without a server: what is shown of an engine with a KV method, and that nothing is of all others. Needs
prometheus_client; one test, vLLM."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile

import pytest

from llm_accel.integrations.vllm.counters import Counters
from llm_accel.integrations.vllm.counts import Labels

pytest.importorskip("prometheus_client")
LABELS = Labels("m", "1", "snapkv:budget=777")


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.setenv("LLM_ACCEL_VLLM_RUN", "abc")


def shown(collector) -> dict[tuple[str, str], float]:
    return {
        (sample.name, sample.labels["engine"]): sample.value
        for family in collector.collect()
        for sample in family.samples
    }


def test_engines_without_a_kv_method_have_no_metrics_of_ours(tmp_path):
    from llm_accel.integrations.vllm.metrics import FreedBlocks

    made = FreedBlocks()
    assert shown(made) == {}
    (tmp_path / "llm_accel-vllm-abc-0-ffff").write_bytes(b"not one of ours")
    assert shown(made) == {}


def test_what_was_freed_is_shown():
    from prometheus_client import CollectorRegistry

    from llm_accel.integrations.vllm.metrics import FreedBlocks

    registry, counters = CollectorRegistry(auto_describe=True), Counters(LABELS)
    registry.register(FreedBlocks())
    counters.run(3)
    assert shown(registry) == {
        ("llm_accel:requests_running", "1"): 3,
        ("llm_accel:kv_blocks_freed", "1"): 0,
        ("llm_accel:kv_bytes_freed", "1"): 0,
    }
    counters.add(4, 1024)
    counters.add(2, 1024)
    Counters(Labels("m", "2", "snapkv:budget=777")).add(1, 8)  # an engine that started later
    assert shown(registry)["llm_accel:kv_blocks_freed", "1"] == 6
    assert shown(registry)["llm_accel:kv_bytes_freed", "1"] == 6 * 1024
    assert shown(registry)["llm_accel:kv_blocks_freed", "2"] == 1


COUNTS = """
from llm_accel.integrations.vllm.counters import Counters
from llm_accel.integrations.vllm.counts import Labels
made = Counters(Labels("m", "0", "snapkv"))
made.run(2)
made.add(5, 8)
"""
SHOWS = """
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


def test_several_servers_show_the_same_counts(tmp_path):
    """vLLM gives them a folder, in which Prometheus keeps what processes count, and removes it."""
    folder = tmp_path / "shared"
    folder.mkdir()
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(folder)}
    subprocess.run([sys.executable, "-c", COUNTS], env=environment, check=True)
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", SHOWS], env=environment, check=True, capture_output=True, text=True
        )
        assert 'llm_accel:kv_blocks_freed{engine="0",method="snapkv",model_name="m"} 5.0' in done.stdout
        assert 'llm_accel:requests_running{engine="0",method="snapkv",model_name="m"} 2.0' in done.stdout
    assert [one.name for one in tmp_path.iterdir()] == ["shared"]


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
def test_the_statistics_of_engines_are_left_as_they_are():
    """vLLM keeps statistics on, whatever it was told, where a stat-logger plug-in is installed."""
    from vllm.v1.metrics.loggers import load_stat_logger_plugin_factories

    assert not [one for one in load_stat_logger_plugin_factories() if one.__module__.startswith("llm_accel")]
