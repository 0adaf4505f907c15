"""StreamingLLM: the first tokens (attention sinks) and the most recent ones stay (arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from llm_accel.methods.base import ENTRIES, MethodInfo, option
from llm_accel.methods.prompt_view import PromptView
from llm_accel.methods.roles import StepEviction, StepView


@dataclass(frozen=True)
class StreamingLLM(StepEviction):
    """Only the sinks and the last entries stay, in the prompt and at every decode step: the floor for other methods."""

    sinks: int = option("first real tokens of the prompt, always kept", 4, most=ENTRIES, least=0)
    positions: Literal["original", "cache"] = option(
        "original: entries keep their positions; cache: positions are counted in the cache, for endless streams",
        "original",
    )

    name: ClassVar[str] = "streaming_llm"
    info: ClassVar[MethodInfo] = MethodInfo(
        "StreamingLLM, arXiv 2309.17453", "KV cache after the prompt and while decoding"
    )

    @property
    def reserved(self) -> int:
        return self.sinks

    @property
    def reserved_for(self) -> str:
        return f"{self.sinks} sinks are always kept and count"

    @property
    def relative_positions(self) -> bool:
        return self.positions == "cache"

    def score(self, view: PromptView) -> Tensor:
        return view.cache_positions.float()[:, None].expand(view.key.shape[0], view.kv_heads, -1)

    def always_keep(self, view: PromptView) -> Tensor:
        return view.cache_positions < self.sinks

    def victims(self, view: StepView) -> Tensor:
        """The oldest entry that is no sink."""
        last = torch.iinfo(torch.int64).max
        return view.positions.masked_fill(view.positions < self.sinks, last).argmin(-1)
