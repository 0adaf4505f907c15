"""Training-free inference acceleration for HuggingFace models: one line on, one line off, a report of what was saved.

Names are loaded on first use, so that ``llm-accel --help`` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from llm_accel.errors import (
    AlreadyAppliedError,
    ConfigError,
    EvictionError,
    LlmAccelError,
    UnknownMethodError,
    UnsupportedCallError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from llm_accel.api import Handle, apply, remove
    from llm_accel.methods import (
        H2O,
        AdaKV,
        Dense,
        Downsample,
        DyVTE,
        FastV,
        FlowCut,
        HiP,
        PyramidKV,
        RandomKV,
        RandomTokens,
        RetrievalHeads,
        SnapKV,
        StreamingLLM,
        StrideTokens,
        VASparse,
        VisionZip,
        list_methods,
        register_method,
    )
    from llm_accel.report import LayerReport, Report

__version__ = "0.1.0"

__all__ = [
    "H2O",
    "AdaKV",
    "AlreadyAppliedError",
    "ConfigError",
    "Dense",
    "Downsample",
    "DyVTE",
    "EvictionError",
    "FastV",
    "FlowCut",
    "Handle",
    "HiP",
    "LayerReport",
    "LlmAccelError",
    "PyramidKV",
    "RandomKV",
    "RandomTokens",
    "Report",
    "RetrievalHeads",
    "SnapKV",
    "StreamingLLM",
    "StrideTokens",
    "UnknownMethodError",
    "UnsupportedCallError",
    "UnsupportedModelError",
    "VASparse",
    "VisionZip",
    "apply",
    "list_methods",
    "register_method",
    "remove",
]

_HOMES = {
    "Handle": "llm_accel.api",
    "apply": "llm_accel.api",
    "remove": "llm_accel.api",
    "LayerReport": "llm_accel.report",
    "Report": "llm_accel.report",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES.get(name, "llm_accel.methods")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
