"""Random KV entries: the floor that shows what a budget is worth without any choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llm_accel.methods.base import ENTRIES, MethodInfo, option
from llm_accel.methods.prompt_view import PromptView
from llm_accel.methods.roles import PromptCompression
from llm_accel.methods.selection import uniform


@dataclass(frozen=True)
class RandomKV(PromptCompression):
    """Keeps the last entries and a seeded random choice of the others, drawn per layer and KV head."""

    window: int = option("last entries of the prompt, always kept", 32, most=ENTRIES, least=0)
    seed: int = option("seed of the draw; the same seed keeps the same positions", 0)

    name: ClassVar[str] = "random"
    info: ClassVar[MethodInfo] = MethodInfo("control, no paper", "KV cache after the prompt")

    @property
    def reserved(self) -> int:
        return self.window

    @property
    def reserved_for(self) -> str:
        return f"the last {self.window} entries are always kept and count"

    def score(self, view: PromptView) -> Tensor:
        head = view.heads.numbers(view.kv_heads, view.key.device)[None, :, None]
        stream = (self.seed * 4099 + view.layer) * 1031 % 2**32  # all that the hash reads of it; more may pass int64
        draw = uniform(view.cache_positions[:, None], stream + head)
        return draw.expand(view.key.shape[0], -1, -1)

    def always_keep(self, view: PromptView) -> Tensor:
        return view.newest(self.window)
