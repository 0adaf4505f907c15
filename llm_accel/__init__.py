"""Training-free inference acceleration for HuggingFace models: one line on, one line off, a report of what was saved.

Names are loaded on first use, so that ``llm-accel --help`` does not wait for torch.
"""

from __future__ import annotations

import importlib
import sys
import types
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
    )
    from llm_accel.registry import methods
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
    "methods",
    "remove",
]

_HOMES = {
    "Handle": "llm_accel.api",
    "apply": "llm_accel.api",
    "remove": "llm_accel.api",
    "methods": "llm_accel.registry",
    "LayerReport": "llm_accel.report",
    "Report": "llm_accel.report",
}


class _Package(types.ModuleType):
    """The module with lazy names. ``llm_accel.methods`` is the registry function; the subpackage of the same name,
    which the import system would bind over it, stays importable as ``from llm_accel.methods import SnapKV``."""

    def __getattr__(self, name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_HOMES.get(name, "llm_accel.methods")), name)
        super().__setattr__(name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "methods" or not isinstance(value, types.ModuleType):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
