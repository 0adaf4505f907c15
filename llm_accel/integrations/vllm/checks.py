"""What an engine that asks for our methods must be like. Every attention layer of such an engine comes by here,
whatever its backend, so that none runs without the method it was started for."""

from __future__ import annotations

import logging
from contextvars import ContextVar
from typing import Any

from vllm.config import get_current_vllm_config_or_none

from llm_accel.errors import ConfigError
from llm_accel.integrations.vllm import compat
from llm_accel.integrations.vllm.settings import Settings, settings_of

logger = logging.getLogger("vllm.llm_accel")
_SAID: set[str] = set()
PRUNING: ContextVar[bool] = ContextVar("llm_accel_vllm_pruning", default=False)
"""Whether the layers that are being built belong to a model that prunes visual tokens."""


def current_settings() -> Settings | None:
    """What the engine that is being built asks for."""
    config = get_current_vllm_config_or_none()
    model = getattr(config, "model_config", None)
    return None if model is None else settings_of(model)


def check_engine(backend: str, takes_kv: bool) -> Settings | None:
    """The settings of the engine that is being built, which this attention backend can serve.

    Raises:
        ConfigError: it cannot; the message says why.
    """
    settings = current_settings()
    if settings is None:
        return None
    config = get_current_vllm_config_or_none()
    if settings.kv is not None:
        reason = compat.problem("kv") or (None if takes_kv else _backend_reason(backend)) or _kv_reason(config)
        if reason is not None:
            raise ConfigError(f"{settings.kv.spec()} cannot run in this engine: {reason}.")
    if settings.visual is not None:
        reason = None if PRUNING.get() else _visual_reason(config)
        if getattr(config, "ec_transfer_config", None) is not None:
            reason = "a shared cache of encoder outputs may hold those of other methods"
        if getattr(getattr(config, "lora_config", None), "enable_tower_connector_lora", False):
            reason = "LoRA in the tower counts its rows by the tokens of the prompt, and those are fewer"
        if reason is not None:
            raise ConfigError(f"{settings.visual.spec()} cannot run in this engine: {reason}.")
    _say(settings, backend)
    return settings


def _say(settings: Settings, backend: str) -> None:
    line = f"llm_accel: {settings.spec} on {backend}"
    if line not in _SAID:
        _SAID.add(line)
        logger.info(line)
        if not compat.tested():
            logger.warning(
                "llm_accel: vllm %s is outside of the tested range %s to %s", compat.version(), *compat.TESTED
            )


def _backend_reason(backend: str) -> str:
    return (
        f"the attention backend is {backend}, and KV methods know the pages of CPU_ATTN, FLASH_ATTN and TRITON_ATTN; "
        "choose one of them by --attention-backend. Models with latent attention (MLA) have none of these"
    )


def _kv_reason(config: Any) -> str | None:
    parallel, cache = config.parallel_config, config.cache_config
    wrong = {
        "speculative decoding looks ahead of what the scheduler has freed": config.speculative_config is not None,
        "a KV connector or KV offloading would move blocks that were rewritten": config.kv_transfer_config is not None,
        "context parallelism spreads the entries of a request over processes": max(
            getattr(parallel, "decode_context_parallel_size", 1), getattr(parallel, "prefill_context_parallel_size", 1)
        )
        > 1,
        "batches that are computed in two halves (dual batch overlap) share the notes of one": bool(
            getattr(parallel, "enable_dbo", False)
        ),
        f"kv_cache_dtype={cache.cache_dtype} stores quantised entries": cache.cache_dtype
        not in ("auto", "float16", "bfloat16", "float32"),
    }
    return next((reason for reason, holds in wrong.items() if holds), None)


def _visual_reason(config: Any) -> str:
    name = next(iter(config.model_config.architectures), "")
    known = list(compat.ARCHITECTURES)
    if name in known and (problem := compat.problem(name)) is not None:
        return problem
    wrong = [f"{name}: {problem}" for name in known if (problem := compat.problem(name)) is not None]
    return f"visual methods know {', '.join(known)}, and this model is none of them" + "".join(
        f" ({one})" for one in wrong
    )
