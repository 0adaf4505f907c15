"""What vLLM's registries are told. Class paths are strings: models and backends are imported when they are needed."""

from __future__ import annotations

import logging

from llm_accel.integrations.vllm import compat

logger = logging.getLogger("vllm.llm_accel")
_HERE = "llm_accel.integrations.vllm"
_NO_KERNEL = {"TORCH_SDPA", "NO_ATTENTION"}

PARENTS: dict[str, str] = {}
"""The classes whose places our backends take, by their names in vLLM's registry: those of another plug-in included."""


def register_all() -> None:
    """Takes the place of attention backends, and of the models whose images we can prune, as far as the installed vLLM
    has the interfaces. vLLM calls this several times in a process."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    for name, backend in AttentionBackendEnum.__members__.items():
        known = backend.is_overridden() or backend.value
        if name not in _NO_KERNEL and name not in PARENTS and known:
            PARENTS[name] = backend.get_path()
            register_backend(backend, f"{_HERE}.backends.{name}")
    _register_spec()
    _register_models()


def _register_spec() -> None:
    reason = compat.problem("kv")
    if reason is not None:
        logger.warning("llm_accel: KV methods are off: %s", reason)
        return
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from llm_accel.integrations.vllm.scheduling import CompressedManager, CompressedSpec

    # first vLLM's own: it never registers them once the table has an entry
    KVCacheSpecRegistry.check_kv_cache_spec_registry({})
    KVCacheSpecRegistry.register(CompressedSpec, CompressedManager, FullAttentionSpec)


def _register_models() -> None:
    from vllm import ModelRegistry

    for name in compat.ARCHITECTURES:
        ModelRegistry.register_model(name, f"{_HERE}.models:{name}")
