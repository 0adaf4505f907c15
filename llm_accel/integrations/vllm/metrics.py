"""Freed blocks in vLLM's `/metrics`: found by the entry point ``vllm.stat_logger_plugins``, in servers alone.

Gauges, not counters, because each of several API servers reads the same counts: of those they show the newest.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

from prometheus_client import Gauge
from vllm.v1.metrics.loggers import StatLoggerBase

from llm_accel.integrations.vllm.counters import Reader
from llm_accel.integrations.vllm.settings import settings_of

logger = logging.getLogger("vllm.llm_accel")
_LABELS = ("model_name", "engine", "method")


@cache
def gauge(name: str, text: str) -> Gauge:
    """One gauge per name, however many engines this process has had."""
    return Gauge(f"llm_accel:{name}", text, _LABELS, multiprocess_mode="mostrecent")


class FreedBlocks(StatLoggerBase):
    """Metrics of one engine with a KV method; silent for all others."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        settings = settings_of(vllm_config.model_config)
        self.kv = None if settings is None else settings.kv
        if self.kv is None:
            return
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        self._reader = Reader(engine_index)
        # every worker holds the blocks of its layers and heads
        self._copies = model.hf_text_config.num_hidden_layers * parallel.tensor_parallel_size
        labels = (model.served_model_name, str(engine_index), self.kv.spec())
        self._blocks = gauge(
            "kv_blocks_freed", "KV blocks that were freed before their request had ended, since the engine's start."
        ).labels(*labels)
        self._bytes = gauge("kv_bytes_freed", "Their bytes, in all layers of all workers.").labels(*labels)
        self._running = gauge("requests_running", "Requests that run in the newest step.").labels(*labels)

    def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any) -> None:
        """Takes over what the scheduler says of a step."""
        if self.kv is None or scheduler_stats is None:
            return
        self._running.set(scheduler_stats.num_running_reqs)
        counts = self._reader.read()
        if counts is not None:
            self._blocks.set(counts.blocks)
            self._bytes.set(counts.blocks * counts.page * self._copies)

    def log_engine_initialized(self) -> None:
        if self.kv is not None:
            logger.info("llm_accel: /metrics shows what %s frees, as llm_accel:kv_blocks_freed", self.kv.spec())
