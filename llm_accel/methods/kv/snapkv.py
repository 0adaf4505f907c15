"""SnapKV: the last queries of the prompt vote for the KV entries that stay (arXiv 2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from llm_accel.kernels.column_votes import column_votes
from llm_accel.methods.base import MethodInfo, option
from llm_accel.methods.prompt_view import PromptView
from llm_accel.methods.roles import PromptCompression
from llm_accel.methods.selection import per_head


@dataclass(frozen=True)
class SnapKVOptions(PromptCompression):
    """The options of SnapKV, for all methods that may score as it does."""

    window: int = option("observation window: last queries of the prompt, always kept", 32, most=8192, least=1)
    kernel: int = option("pooling kernel over neighbouring positions, odd", 7, most=255)
    pool: Literal["max", "avg"] = option("pooling of the votes: max or avg", "max")
    gqa: Literal["mean", "max"] = option(
        "reduction of the votes over the query heads of a KV head: mean or max", "mean"
    )
    tie: Literal["raw", "index"] = option(
        "equal pooled votes: raw, the higher unpooled vote wins; index, the older", "raw"
    )
    score_dtype: Literal["fp32", "compat"] = option(
        "fp32, or compat: probabilities rounded to the model's dtype as in the published code", "fp32"
    )

    def score(self, view: PromptView) -> Tensor:
        return self.score_and_tie_break(view)[0]


@dataclass(frozen=True)
class SnapKV(SnapKVOptions):
    """Keeps the observation window and the entries that its queries attend to most, per KV head."""

    name: ClassVar[str] = "snapkv"
    info: ClassVar[MethodInfo] = MethodInfo("SnapKV, arXiv 2404.14469", "KV cache after the prompt", needs_query=True)

    def validate(self) -> None:
        if self.kernel < 1 or self.kernel % 2 == 0:
            self.fail("kernel", "an odd integer of at least 1")
        super().validate()

    @property
    def reserved(self) -> int:
        return self.window

    @property
    def reserved_for(self) -> str:
        return f"the observation window of {self.window} is always kept and counts"

    @property
    def observed_queries(self) -> int:
        return self.window

    def votes(self, view: PromptView) -> tuple[Tensor, Tensor]:
        """Pooled and raw votes for the entries before the window, fp32 [B, kv_heads, S - W]."""
        rounding = view.query.dtype if self.score_dtype == "compat" else None
        raw = column_votes(
            view.query,
            view.key,
            view.start,
            heads=view.kv_heads,
            scaling=view.scaling,
            softcap=view.softcap,
            sinks=view.sinks,
            group=self.gqa,
            round_to=rounding,
        )[..., : view.slots - self.window]
        inside = per_head(view.valid)[..., : raw.shape[-1]]
        return pooled_votes(raw, inside, self.kernel, self.pool), raw

    def scores_of(self, pooled: Tensor, raw: Tensor) -> tuple[Tensor, Tensor | None]:
        """What :meth:`votes` returned as score and tie break of all S entries."""
        pooled, raw = (F.pad(votes, (0, self.window)) for votes in (pooled, raw))
        return pooled, raw if self.tie == "raw" else None

    def score_and_tie_break(self, view: PromptView) -> tuple[Tensor, Tensor | None]:
        return self.scores_of(*self.votes(view))

    def always_keep(self, view: PromptView) -> Tensor:
        return view.newest(self.window)


def pooled_votes(votes: Tensor, inside: Tensor, kernel: int, pool: str) -> Tensor:
    """Votes pooled over ``kernel`` neighbours; padding takes part in neither maximum nor average.

    Args:
        votes: of any sign, [B, H, n].
        inside: bool [B or 1, H or 1, n], True for real entries.
        kernel: odd width; stride 1, length preserved.
        pool: "max" or "avg".
    """
    if kernel == 1:
        return votes
    margin = kernel // 2
    if pool == "max":
        return F.max_pool1d(votes.masked_fill(~inside, float("-inf")), kernel, stride=1, padding=margin)
    total = F.avg_pool1d(votes.masked_fill(~inside, 0.0), kernel, stride=1, padding=margin, count_include_pad=True)
    share = F.avg_pool1d(inside.to(votes.dtype), kernel, stride=1, padding=margin, count_include_pad=True)
    return total / share.clamp(min=1.0 / kernel)
