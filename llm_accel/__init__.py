"""Training-free inference acceleration for HuggingFace models: one line on, one line off, a report of what was saved.

Names are loaded on first use, so that ``llm-accel --help`` does not wait for torch. The classes of all methods of the
package are among them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from llm_accel.errors import AlreadyAppliedError as AlreadyAppliedError
from llm_accel.errors import ConfigError as ConfigError
from llm_accel.errors import EvictionError as EvictionError
from llm_accel.errors import LlmAccelError as LlmAccelError
from llm_accel.errors import UnknownMethodError as UnknownMethodError
from llm_accel.errors import UnsupportedCallError as UnsupportedCallError
from llm_accel.errors import UnsupportedModelError as UnsupportedModelError

if TYPE_CHECKING:
    from llm_accel.api import Handle as Handle
    from llm_accel.api import apply as apply
    from llm_accel.api import remove as remove
    from llm_accel.methods import *  # noqa: F403
    from llm_accel.report import LayerReport as LayerReport
    from llm_accel.report import Report as Report

__version__ = "0.1.0"

_HOMES = {
    "Handle": "llm_accel.api",
    "apply": "llm_accel.api",
    "remove": "llm_accel.api",
    "list_methods": "llm_accel.methods",
    "register_method": "llm_accel.methods",
    "LayerReport": "llm_accel.report",
    "Report": "llm_accel.report",
}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        errors = [key for key, value in globals().items() if isinstance(value, type) and issubclass(value, Exception)]
        return sorted([*_HOMES, *errors, *_classes()])
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif not name[:1].isupper() or name not in (classes := _classes()):  # other names must not load torch
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    else:
        value = classes[name]
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})


def _classes() -> dict[str, type]:
    return {cls.__name__: cls for cls in importlib.import_module("llm_accel.methods").BUILT_IN}
