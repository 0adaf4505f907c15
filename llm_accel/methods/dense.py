"""No method: the cache stays whole. With compiled decoding it shows what that alone is worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llm_accel.methods.base import MethodInfo
from llm_accel.methods.roles import WholeCache


@dataclass(frozen=True)
class Dense(WholeCache):
    """Keeps every entry and computes what the model itself computes; there to be decoded as one compiled graph."""

    name: ClassVar[str] = "dense"
    info: ClassVar[MethodInfo] = MethodInfo(
        "control, no paper", "nothing; baseline for compiled decoding", frees_memory=False
    )
