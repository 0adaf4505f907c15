"""The models that vLLM gets for the architectures whose images we can prune, by the names of those architectures.

Where the installed vLLM has other interfaces than ours need, it gets its own class back: engines that ask for nothing
run as ever, and one that asks is refused when its first attention layer is built.
"""

from __future__ import annotations

import importlib
from typing import Any

from llm_accel.integrations.vllm import compat

_KINDS = {"Mrope": "mrope", "Packed": "tiled", "Tile": "tiled"}
_SUFFIX = "ForConditionalGeneration"


def __getattr__(name: str) -> Any:
    known = compat.ARCHITECTURES.get(name)
    if known is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if compat.problem(name) is not None:
        return getattr(importlib.import_module(known.module), known.family + _SUFFIX)
    if known.kind == "llava":
        return importlib.import_module("llm_accel.integrations.vllm.llava").AccelLlava
    made = globals()[name] = _made(known)
    return made


def _made(known: compat.Architecture) -> Any:
    """A model and its processor, from our mixins and vLLM's own classes: those of a kind differ in their parents."""
    from vllm.multimodal import MULTIMODAL_REGISTRY

    ours = importlib.import_module(f"llm_accel.integrations.vllm.{_KINDS[known.kind]}")
    parents = importlib.import_module(known.module)

    def made(part: str, name: str, **members: Any) -> Any:
        parent = getattr(parents, known.family + name)
        members |= {"__module__": __name__, "__doc__": parent.__doc__}
        return type(f"Accel{known.family}{name}", (getattr(ours, known.kind + part), parent), members)

    members = {}
    if known.kind == "Packed":
        from llm_accel.integrations.vllm.visual import PLAIN_TOWER

        members["hf_to_vllm_mapper"] = getattr(parents, known.family + _SUFFIX).hf_to_vllm_mapper | PLAIN_TOWER
    dummies = known.family if hasattr(parents, f"{known.family}DummyInputsBuilder") else "Llava"
    register = MULTIMODAL_REGISTRY.register_processor(
        made("Processor", "MultiModalProcessor"),
        info=made("Info", "ProcessingInfo"),
        dummy_inputs=getattr(parents, f"{dummies}DummyInputsBuilder"),
    )
    return register(made("Model", _SUFFIX, **members))
