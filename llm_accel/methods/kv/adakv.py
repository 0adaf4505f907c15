"""AdaKV: the heads of a layer share one budget, and heads with more to remember get more of it (arXiv 2407.11550); or
those of all layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_accel.methods.base import MethodInfo, option
from llm_accel.methods.kv.division import Division
from llm_accel.methods.kv.snapkv import SnapKV
from llm_accel.methods.prompt_view import PromptView
from llm_accel.methods.selection import ABSENT, FIRST, slots_of
from llm_accel.methods.shard import HeadShard

_SHARES = 10**6  # alpha counts in millionths, so that shares are exact


@dataclass(frozen=True)
class AdaKV(Division):
    """Scores compete across the heads of a layer, which together keep exactly as much as with the base alone.
    ``alpha=1`` leaves nothing to compete for and is the base."""

    alpha: float = option(
        "fraction of the budget that every head is guaranteed, not counting what is always kept, in [0, 1]",
        0.2,
        share="[0, 1]",
    )
    rule: Literal["floor", "blend"] = option(
        "floor: a guaranteed share, the rest to the highest scores of all heads; blend: the published mix of both",
        "floor",
    )
    across: Literal["heads", "model"] = option(
        "who competes: heads, those of each layer; model, those of all layers, which evict together once the whole "
        "prompt has been read",
        "heads",
    )
    normalize: bool = option("normalize the scores of each head before heads are compared", False)
    beta: int = option("steepness of base=pyramidkv", 20, most=10_000, least=1)
    page: int = option("entries per page of the store, whose pages belong to one row and head", 64, most=4096, least=1)

    divides: ClassVar[Literal["layers", "heads"]] = "heads"
    for_base: ClassVar[frozenset[str]] = Division.for_base | {"beta"}

    name: ClassVar[str] = "adakv"
    info: ClassVar[MethodInfo] = MethodInfo(
        "AdaKV, arXiv 2407.11550", "KV cache after the prompt, each head to its own size", needs_query=True
    )

    def validate(self) -> None:
        super().validate()
        if self.normalize and not isinstance(self.score_method, SnapKV):
            self.fail("normalize", f"false with base={self.base}, whose scores are no votes that add up to a whole")
        if self.across == "model":
            self._check_together()

    def _check_together(self) -> None:
        later = {"compress": "eager", "multi_turn": "append", "recompress_every": None}
        for name, needed in later.items():
            if getattr(self, name) != needed:
                self.fail(name, f"{needed} with across=model, where all layers evict at the end of the first prompt")
        if isinstance(self.scorer, Division):
            needed = f"a method that gives each layer as much with across=model, and {self.scorer.name} does not"
            self.fail("base", needed)

    @property
    def layers_compete(self) -> bool:
        return self.across == "model"

    @property
    def page_size(self) -> int | None:
        return self.page

    def score_and_tie_break(self, view: PromptView) -> tuple[Tensor, Tensor | None]:
        if not (self.normalize and isinstance(self.score_method, SnapKV)):
            return super().score_and_tie_break(view)
        pooled, raw = self.score_method.votes(view)
        mass = raw.sum(-1, keepdim=True).clamp(min=torch.finfo(raw.dtype).tiny)
        return self.score_method.scores_of(pooled / mass, raw / mass)

    def allocate(self, priority: Tensor, view: PromptView) -> Tensor:
        """What the heads keep, each a number of its own."""
        priority = of_all_heads(priority, view.heads)
        heads, stored = priority.shape[1], (priority > ABSENT).sum((1, 2))
        average = self.row_entries((stored + heads - 1) // heads, view)
        kept = self.shared(priority, average, torch.minimum(stored, heads * average))
        return slots_of(view.heads.mine(kept)[..., -view.slots :])

    def select_all(self, views: Sequence[PromptView]) -> list[Tensor]:
        if self.across != "model":
            return super().select_all(views)

        def choose(priority: Tensor) -> Tensor:
            heads, stored = priority.shape[1], (priority > ABSENT).sum((1, 2))
            average = self.row_entries((stored + heads - 1) // heads, views[0])
            return self.shared(priority, average, torch.minimum(stored, heads * average))

        return slots_of_all_layers([self.order(view) for view in views], choose, views)

    def shared(self, priority: Tensor, average: Tensor, totals: Tensor) -> Tensor:
        """The entries that the heads keep when they share ``totals``.

        Args:
            priority: order of the entries as of :func:`~llm_accel.methods.selection.total_order`, int64 [B, H, S].
            average: entries per head, those always kept included, int64 [B].
            totals: entries of all heads of a row, int64 [B].

        Returns:
            bool [B, H, S], ``totals[b]`` of them True in row ``b``.
        """
        chosen = (average - self.reserved).clamp(min=0)
        share = round(self.alpha * _SHARES)
        if self.rule == "floor":
            sure = torch.minimum(chosen, (chosen * share // _SHARES).clamp(min=int(share > 0)))[:, None]
        else:
            won = best_of_all(priority, totals).sum(-1) - (priority > ABSENT).sum(-1).clamp(max=self.reserved)
            sure = blended(won.clamp(min=0), share)
        order = priority.sort(dim=-1, descending=True, stable=True).indices
        steps = torch.arange(priority.shape[-1], device=priority.device).expand_as(order)
        place = torch.empty_like(order).scatter_(-1, order, steps)
        secured = (place < self.reserved + sure[..., None]) & (priority > ABSENT)
        return best_of_all(priority.masked_fill(secured, FIRST), totals)


def of_all_heads(priority: Tensor, heads: HeadShard) -> Tensor:
    """The order of the entries of all heads, those in other processes too; right-aligned, :data:`ABSENT` where heads
    hold fewer. int64 [B, h, S] -> [B, H, longest S]."""
    if heads.count == 1:
        return priority
    longest = int(heads.max(torch.tensor(priority.shape[-1], device=priority.device)))
    return heads.every(F.pad(priority, (longest - priority.shape[-1], 0), value=ABSENT))


def best_of_all(priority: Tensor, totals: Tensor) -> Tensor:
    """The ``totals[b]`` best entries of all heads of row ``b``; equal ones by the lower index, then the lower head.
    int64 [B, H, S] and [B] -> bool [B, H, S]."""
    batch, heads, slots = priority.shape
    order = priority.transpose(1, 2).reshape(batch, -1).sort(dim=-1, descending=True, stable=True).indices
    taken = torch.arange(heads * slots, device=priority.device) < totals[:, None]
    mask = torch.zeros_like(taken).scatter_(-1, order, taken)
    return mask.view(batch, slots, heads).transpose(1, 2) & (priority > ABSENT)


def slots_of_all_layers(
    priorities: Sequence[Tensor], choose: Callable[[Tensor], Tensor], views: Sequence[PromptView]
) -> list[Tensor]:
    """What layers keep that are seen as one layer with the heads of all.

    Args:
        priorities: of each layer the order of its entries, int64 [B, H, S], as of
            :func:`~llm_accel.methods.selection.total_order`.
        choose: which entries stay of such an order of all heads: int64 [B, sum of H, S] -> bool.
        views: the layers; heads in other processes take part.

    Returns:
        slots of each layer, int64 [B, H, n], ascending, -1 first where a row or head keeps fewer than n.
    """
    device = priorities[0].device
    every = [of_all_heads(priority, view.heads).to(device) for priority, view in zip(priorities, views, strict=True)]
    longest = max(priority.shape[-1] for priority in every)
    padded = [F.pad(priority, (longest - priority.shape[-1], 0), value=ABSENT) for priority in every]
    kept = choose(torch.cat(padded, dim=1)).split([priority.shape[1] for priority in every], dim=1)
    return [
        slots_of(view.heads.mine(mask)[..., -view.slots :].to(view.key.device))
        for mask, view in zip(kept, views, strict=True)
    ]


def blended(won: Tensor, share: int) -> Tensor:
    """Entries per head that mix what heads win in open competition with an even split, rounded so that the sum stays:
    the largest remainders are rounded up, the lower head first where they are equal.

    Args:
        won: entries of each head in open competition, int64 [B, H].
        share: weight of the even split in millionths.

    Returns:
        int64 [B, H] with the row sums of ``won``.
    """
    heads, total = won.shape[-1], won.sum(-1, keepdim=True)
    unit = heads * _SHARES
    scaled = won * (heads * (_SHARES - share)) + total * share
    whole, remainder = scaled // unit, scaled % unit
    place = remainder.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return whole + (place < total - whole.sum(-1, keepdim=True))
