"""llm_accel inside vLLM: fewer KV blocks per request, fewer visual tokens per image, chosen by one override.

``LLM(model, hf_overrides={"llm_accel": {"method": "snapkv:budget=2048"}})``, or ``--hf-overrides`` on vLLM's command
line. vLLM finds :func:`register` by the entry point ``vllm.general_plugins`` and calls it in each of its processes.
Nothing heavy is imported before a class of ours is needed.
"""

from __future__ import annotations

import logging

logger = logging.getLogger("vllm.llm_accel")


def register() -> None:
    """Makes our classes known to vLLM. Without our key in the overrides they act as those whose place they take.

    An error in a plug-in would stop every engine of the user, those that never heard of us included: it is logged.
    """
    try:
        from llm_accel.integrations.vllm.counters import name_run
        from llm_accel.integrations.vllm.metrics import show_counts
        from llm_accel.integrations.vllm.registration import register_all

        name_run()
        show_counts()
        register_all()
    except Exception:
        logger.exception("llm_accel: the vLLM plug-in could not be set up; engines run as without it")
