"""The models that vLLM gets for the architectures whose images we can prune, by the names of those architectures.

Where the installed vLLM has other interfaces than ours need, it gets its own class back: engines that ask for nothing
run as ever, and one that asks is refused when its first attention layer is built.
"""

from __future__ import annotations

import importlib
from typing import Any

from llm_accel.integrations.vllm import compat

_MODELS = "vllm.model_executor.models"
_SUFFIX = "ForConditionalGeneration"


def __getattr__(name: str) -> Any:
    module = compat.ARCHITECTURES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if compat.problem(name) is not None:
        return getattr(importlib.import_module(f"{_MODELS}.{module}"), name)
    if module == "llava":
        return importlib.import_module("llm_accel.integrations.vllm.llava").AccelLlava
    made = globals()[name] = _qwen(module, name.removesuffix(_SUFFIX))
    return made


def _qwen(module: str, family: str) -> Any:
    """A model of Qwen's with three axes of positions, and its processor; they differ in their parents alone."""
    from vllm.multimodal import MULTIMODAL_REGISTRY

    from llm_accel.integrations.vllm.mrope import MropeInfo, MropeModel, MropeProcessor

    parents = importlib.import_module(f"{_MODELS}.{module}")

    def made(ours: type[Any], part: str) -> Any:
        parent = getattr(parents, family + part)
        return type(f"Accel{family}{part}", (ours, parent), {"__module__": __name__, "__doc__": parent.__doc__})

    register = MULTIMODAL_REGISTRY.register_processor(
        made(MropeProcessor, "MultiModalProcessor"),
        info=made(MropeInfo, "ProcessingInfo"),
        dummy_inputs=getattr(parents, f"{family}DummyInputsBuilder"),
    )
    return register(made(MropeModel, _SUFFIX))
