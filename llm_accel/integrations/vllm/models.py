"""The models that vLLM gets for the architectures whose images we can prune, by the names of those architectures.

Where the installed vLLM has other interfaces than ours need, it gets its own class back: engines that ask for nothing
run as ever, and one that asks is refused when its first attention layer is built.
"""

from __future__ import annotations

import importlib
from typing import Any

from llm_accel.integrations.vllm import compat

_HERE = "llm_accel.integrations.vllm"
_OURS = {
    "LlavaForConditionalGeneration": ("llava", f"{_HERE}.llava", "AccelLlava"),
    "Qwen2_5_VLForConditionalGeneration": ("qwen2_5_vl", f"{_HERE}.qwen2_5", "AccelQwen2_5"),
    "Qwen3VLForConditionalGeneration": ("qwen3_vl", f"{_HERE}.qwen3", "AccelQwen3"),
}


def __getattr__(name: str) -> Any:
    if name not in _OURS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    usual, module, ours = _OURS[name]
    if compat.problem(name) is None:
        return getattr(importlib.import_module(module), ours)
    return getattr(importlib.import_module(f"vllm.model_executor.models.{usual}"), name)
