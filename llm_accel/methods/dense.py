"""No method: the cache stays whole. With compiled decoding it shows what that alone is worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from llm_accel.methods.base import ENTRIES, MethodConfig, MethodInfo, option
from llm_accel.methods.claims import Claim


@dataclass(frozen=True)
class Dense(MethodConfig):
    """Keeps every entry and computes what the model itself computes; there to be decoded as one compiled graph."""

    capacity: int | None = option(
        "tokens of prompt and answer that the buffers of compiled decoding hold: all calls up to it share one graph; "
        "None, and longer calls: as many as needed, in buckets",
        None,
        most=ENTRIES,
        least=1,
    )

    name: ClassVar[str] = "dense"
    info: ClassVar[MethodInfo] = MethodInfo(
        "control, no paper", "nothing; baseline for compiled decoding", frees_memory=False
    )

    @property
    def claims(self) -> Mapping[Claim, str]:
        return dict.fromkeys(Claim, "is the model as it is; give it alone, or leave it out.")
