"""PAINT: the last query looks more at tokens of the image that its vision tower finds important (arXiv 2501.12206).

    summary B:  tokens j with c_j > Q3 + 1.5 (Q3 - Q1), c the attention of the class token in the layer whose features
                are used
    local A:    the share ``local`` of the tokens with the highest attention of the class token in the first layer, B
                left out
    z_j <- z_j + alpha |z_j| for j in A,  z_j <- z_j + beta |z_j| for j in B

on the logits z of the last query of a call, after the mask and before softmax, in all layers from ``first_layer`` on. A
tower without a class token gives the attention that each patch receives from all others instead. PAI (arXiv 2407.21771)
is the case of one weight for all visual tokens, ``alpha=0.2,beta=0.2,local=1``, for which no tower is looked at.

With L the log-sum-exp of the row and d_j = alpha |z_j| or beta |z_j|, the new output needs the values of A and B alone:

    L' = log(exp(L) + sum_j exp(z_j) (exp(d_j) - 1))
    out' = exp(L - L') out + sum_j exp(z_j - L') (exp(d_j) - 1) v_j
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llm_accel.methods.base import LAYERS, MethodInfo, option
from llm_accel.methods.selection import top_tokens
from llm_accel.methods.visual.grounding import Columns, WeightShift

LOCAL, SUMMARY = 1, 2
CLIFF = 0.7


@dataclass(frozen=True)
class PAINT(WeightShift):
    """Raises the attention that each new token pays to the image; ``alpha=0,beta=0`` switch it off."""

    alpha: float = option("weight of local tokens; 0: none", 0.7, most=100.0, least=0)
    beta: float = option("weight of summary tokens; 0: none", 0.3, most=100.0, least=0)
    local: float = option("share of an image's tokens that are local, in [0, 1]", 0.25, share="[0, 1]")
    first_layer: int | None = option(
        "the first layer that is corrected; None: the third, or the last of a model with fewer",
        None,
        most=LAYERS,
        least=0,
    )

    name: ClassVar[str] = "paint"
    info: ClassVar[MethodInfo] = MethodInfo(
        "PAINT, arXiv 2501.12206; PAI, arXiv 2407.21771",
        "nothing; against hallucination",
        frees_memory=False,
        kinds=("vision",),
    )

    @property
    def acts(self) -> bool:
        return self.alpha > 0 or self.beta > 0

    @property
    def cautions(self) -> tuple[str, ...]:
        if max(self.alpha, self.beta) <= CLIFF:
            return ()
        return (
            f"{self.spec()} is beyond a weight of {CLIFF}, where the paper's model fell from its best captions to ones "
            "that leave out half of the image; look at recall and length, not at CHAIR alone",
        )

    @property
    def last_query_only(self) -> bool:
        return True

    @property
    def reads_tower(self) -> bool:
        return self.alpha != self.beta or self.local < 1

    def acting_layers(self, layers: int) -> tuple[int, ...]:
        first = min(2, layers - 1) if self.first_layer is None else self.first_layer
        self._check_layers((first,), layers)
        return tuple(range(first, layers))

    def tower_marks(self, first: Tensor, last: Tensor, there: Tensor) -> Tensor:
        marks = torch.zeros(first.shape, dtype=torch.int8, device=first.device)
        if bool(there.any()):
            marks[top_tokens(first, math.ceil(self.local * len(first) - 1e-9))] = LOCAL
            low, high = torch.quantile(last[there].float(), last.new_tensor([0.25, 0.75], dtype=torch.float32))
            marks[there & (last > high + 1.5 * (high - low))] = SUMMARY
        return marks.masked_fill(~there, 0)

    def marks(self, visual: Tensor, given: Tensor | None, hidden: Tensor | None) -> Tensor:
        return visual.to(torch.int8) * LOCAL if given is None else given

    def shift(self, view: Columns) -> tuple[Tensor, Tensor]:
        strength = (view.marks == LOCAL) * self.alpha + (view.marks == SUMMARY) * self.beta
        seen = view.logits.isfinite()
        raised = strength * view.logits.masked_fill(~seen, 0.0).abs()
        # log(exp(d) - 1), which d alone would let overflow
        more = raised + torch.log1p(-torch.exp(-raised))
        more = torch.where(seen & (raised > 0), view.logits + more, float("-inf"))
        total = torch.logaddexp(view.total, more.logsumexp(-1))
        return (view.total - total).exp(), (more - total[..., None]).exp()

    def counted(self, marks: Tensor) -> dict[str, list[int]]:
        named = {"local": LOCAL, "summary": SUMMARY} if self.reads_tower else {"visual": LOCAL}
        return {name: (marks == mark).sum(-1).tolist() for name, mark in named.items()}
