"""SnapKV: the last queries of the prompt vote for the KV entries that stay (arXiv 2404.14469)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_accel.kernels.column_votes import column_votes
from llm_accel.kernels.dispatch import Problem
from llm_accel.methods.base import MethodInfo, option
from llm_accel.methods.budget import Budgeted
from llm_accel.methods.prompt_view import PromptView
from llm_accel.methods.roles import PromptCompression
from llm_accel.methods.selection import per_head

# kernel="auto", chosen by `python -m benchmarks.defaults`
BEFORE, NEAR = 1, 11  # entries before and behind a vote that it counts for
FAR, FAINT = (16, 24, 32, 40), 0.2  # how much farther behind it, and what part of it counts there
PART = 3  # farther at most than this part of the entries that are chosen
VOTERS = 0.75  # the part of the window that votes, its end
AVERAGED = 15  # neighbours, with pool="avg"


@dataclass(frozen=True)
class SnapKVOptions(PromptCompression):
    """The options of SnapKV, for all methods that may score as it does."""

    window: int = option("observation window: last queries of the prompt, always kept", 32, most=8192, least=1)
    kernel: int | Literal["auto"] = option(
        "odd width of the pooling over neighbours, 7 in the paper; auto: the last three quarters of the window vote, "
        "and a vote counts for what follows it, as far as the budget allows (pool=avg: for 15 neighbours)",
        "auto",
        most=255,
    )
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

    def backends(self, problem: Problem) -> dict[str, tuple[str, str]]:
        if self.carries:
            return {"pooling": ("auto", f"{VOTERS:.0%} of the window vote; {_told(self)}")}
        return {"pooling": (self.pool, f"over {self.width} neighbours")}

    @property
    def carries(self) -> bool:
        """Whether votes count for what follows them, rather than for all neighbours alike."""
        return self.kernel == "auto" and self.pool == "max"

    @property
    def width(self) -> int:
        """Neighbours that are pooled where votes are not carried."""
        return AVERAGED if self.kernel == "auto" else self.kernel


@dataclass(frozen=True)
class SnapKV(SnapKVOptions):
    """Keeps the observation window and the entries that its queries attend to most, per KV head."""

    name: ClassVar[str] = "snapkv"
    info: ClassVar[MethodInfo] = MethodInfo("SnapKV, arXiv 2404.14469", "KV cache after the prompt", needs_query=True)

    def validate(self) -> None:
        if self.kernel != "auto" and (self.kernel < 1 or self.kernel % 2 == 0):
            self.fail("kernel", "'auto' or an odd integer of at least 1")
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

    @property
    def voters(self) -> int:
        """Queries of the window that vote: all of them, or where votes are carried, the last ones."""
        return math.ceil(VOTERS * self.window) if self.carries else self.window

    def votes(self, view: PromptView) -> tuple[Tensor, Tensor]:
        """Pooled and raw votes for the entries before the window, fp32 [B, kv_heads, S - W]."""
        raw = self.raw_votes(view)
        return self.pooled(raw, per_head(view.valid)[..., : raw.shape[-1]], view), raw

    def raw_votes(self, view: PromptView) -> Tensor:
        """The votes of single entries, fp32 [B, kv_heads, S - W]."""
        return column_votes(
            view.query[:, :, -self.voters :],
            view.key,
            view.start,
            heads=view.kv_heads,
            scaling=view.scaling,
            softcap=view.softcap,
            sinks=view.sinks,
            group=self.gqa,
            round_to=view.query.dtype if self.score_dtype == "compat" else None,
        )[..., : view.slots - self.window]

    def pooled(self, raw: Tensor, inside: Tensor, view: PromptView) -> Tensor:
        """Raw votes [B, kv_heads, n] pooled; ``inside``: bool [B or 1, kv_heads or 1, n], True for real entries."""
        if not self.carries:
            return pooled_votes(raw, inside, self.width, self.pool)
        seen = view.lengths if view.seen is None else view.seen
        entries = self.entries_per_row(seen if seen.ndim == 1 else seen.amax(-1))
        return carried_votes(raw, inside, (entries - self.window) // PART)

    def scores_of(self, pooled: Tensor, raw: Tensor) -> tuple[Tensor, Tensor | None]:
        """What :meth:`votes` returned as score and tie break of all S entries."""
        pooled, raw = (F.pad(votes, (0, self.window)) for votes in (pooled, raw))
        return pooled, raw if self.tie == "raw" else None

    def score_and_tie_break(self, view: PromptView) -> tuple[Tensor, Tensor | None]:
        return self.scores_of(*self.votes(view))

    def always_keep(self, view: PromptView) -> Tensor:
        return view.newest(self.window)


def carried_votes(votes: Tensor, inside: Tensor, reach: Tensor) -> Tensor:
    """Votes that count for what follows them: the largest of those nearby, or a fifth of the largest farther off.

    The queries at the end of a prompt look for the token to be read next, the beginning of a name or a number. The rest
    is looked for while decoding, one token after another, and lies behind it.

    Args:
        votes: not negative, [B, H, n].
        inside: bool [B or 1, H or 1, n], True for real entries.
        reach: how far a fifth of a vote counts in each row, int64 [B]; rounded down to one of :data:`FAR`, and not at
            all below the least of them.
    """
    real = votes.masked_fill(~inside, float("-inf"))
    far = _before_and_after(real, FAR[0])
    carried = _before_and_after(real, NEAR)
    for distance in FAR:
        gone = distance - FAR[0]
        shifted = F.pad(far, (gone, 0), value=float("-inf"))[..., : far.shape[-1]]
        reached = (reach >= distance)[:, None, None]
        carried = torch.maximum(carried, (FAINT * shifted).masked_fill(~reached, float("-inf")))
    return carried


def _before_and_after(votes: Tensor, after: int) -> Tensor:
    """The largest of the votes from ``after`` entries before each entry to :data:`BEFORE` after it."""
    around = F.pad(votes, (after, BEFORE), value=float("-inf"))
    return F.max_pool1d(around, after + 1 + BEFORE, stride=1)


def _told(config: Budgeted) -> str:
    """What ``kernel="auto"`` means with a budget, in words."""
    near = f"a vote counts for {BEFORE} entry before it and {NEAR} behind it"
    if config.ratio is not None:
        return f"{near}, a fifth of it for {FAR[-1]}, at most a third of the entries that are chosen"
    reach = (config.entries(2**62) - config.reserved) // PART
    far = max((distance for distance in FAR if distance <= reach), default=None)
    return near if far is None else f"{near}, a fifth of it for {far}"


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
