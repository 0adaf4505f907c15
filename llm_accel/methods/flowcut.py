"""FlowCut: patches leave the vision tower step by step, by the information that flows to its class token
(arXiv 2505.19536).

After each layer a patch j gets the score S_j = (R_j / sum R + M_j / sum M) * I_j, from

- relation R: attention that the class token pays to it, mean over heads;
- semantics M: softmax of the raw dot products of values with the class token's value, mean over heads;
- density I: L1 norm of its value, averaged over heads.

Scores are accumulated, A = (1 - ema) * A + ema * S. After every second layer, counted back from the last cut, the
lowest patches leave: all of them above the target T at the last cut, (N - T) / sqrt(layers to go) * (1 - H^2) of N
before it, where H is the entropy of R over ln N. A tower without a class token is scored by its mean query, R * I.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from llm_accel.methods.base import MethodInfo, option
from llm_accel.methods.selection import top_tokens
from llm_accel.methods.visual import TowerTokens, TowerView

STATIC_ENTROPY = 0.8


@dataclass(frozen=True)
class FlowCut(TowerTokens):
    """Cuts patches inside the vision tower, those that least information flows from."""

    ema: float = option("weight of the newest layer in the accumulated score, in (0, 1]", 0.5)
    cut_every: int = option("layers between two cuts", 2)
    schedule: Literal["adaptive", "static"] = option(
        f"adaptive: how much is cut follows the entropy of attention, per image; static: as for entropy "
        f"{STATIC_ENTROPY}, without waiting for the device",
        "adaptive",
    )

    name: ClassVar[str] = "flowcut"
    info: ClassVar[MethodInfo] = MethodInfo(
        paper="FlowCut, arXiv 2505.19536",
        cuts="visual tokens, inside the vision tower",
        needs_query=False,
        frees_memory=True,
        kinds=("vision",),
    )

    def validate(self) -> None:
        if not 0.0 < self.ema <= 1.0:
            self.fail("ema", "a number in (0, 1]")
        if self.cut_every < 1:
            self.fail("cut_every", "an integer of at least 1")
        super().validate()

    def choose(self, count: int, scores: Tensor | None, device: torch.device) -> Tensor:
        assert scores is not None
        return top_tokens(scores, self.tokens(count))

    def score(self, view: TowerView, before: Tensor | None) -> Tensor:
        now = flow(view)
        return now if before is None else (1 - self.ema) * before + self.ema * now

    def survivors(self, view: TowerView, sizes: Tensor, targets: Tensor) -> Tensor:
        to_go = view.last - view.layer
        if to_go == 0:
            return targets
        if to_go % self.cut_every or not bool((sizes > targets).any()):
            return sizes
        spread = torch.full(sizes.shape, STATIC_ENTROPY) if self.schedule == "static" else entropy(view).cpu()
        cut = ((sizes - targets) / math.sqrt(to_go) * (1 - spread**2)).round().long()
        return torch.maximum(sizes - cut, targets)


def relation(view: TowerView) -> Tensor:
    """Attention of the class token, or of the mean query, to each row: fp32 [B, S], mean over heads."""
    if view.class_token:
        query = view.query[:, :, :1].float()
    else:
        real = view.patches[:, None, :, None].float()
        query = (view.query.float() * real).sum(2, keepdim=True) / real.sum(2, keepdim=True)
    return _probabilities(query @ view.key.float().mT * view.scaling, view.valid)


def semantics(view: TowerView) -> Tensor:
    """Softmax over all rows of the unscaled products of their values with the class token's: fp32 [B, S]."""
    value = view.value.float()
    return _probabilities(value[:, :, :1] @ value.mT, view.valid)


def density(view: TowerView) -> Tensor:
    """L1 norm of the value of each row, averaged over heads first: fp32 [B, S]."""
    return view.value.float().mean(1).abs().sum(-1)


def flow(view: TowerView) -> Tensor:
    """The score of one layer: fp32 [B, N], 0 for padding."""
    if not view.class_token:
        return (relation(view) * density(view)).masked_fill(~view.patches, 0.0)
    attended, alike = relation(view)[:, 1:], semantics(view)[:, 1:]
    share = attended / attended.sum(-1, keepdim=True) + alike / alike.sum(-1, keepdim=True)
    return (share * density(view)[:, 1:]).masked_fill(~view.patches, 0.0)


def entropy(view: TowerView) -> Tensor:
    """Entropy of the relation over the patches, divided by that of a uniform one: fp32 [B] in [0, 1]. A probability
    that underflows counts 0, where the published code has log(0)."""
    attended = relation(view)[:, int(view.class_token) :]
    share = attended / attended.sum(-1, keepdim=True)
    uniform = view.patches.sum(-1).clamp(min=2).float().log()
    spread: Tensor = torch.special.entr(share).sum(-1) / uniform
    return spread


def _probabilities(logits: Tensor, valid: Tensor | None) -> Tensor:
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None, None], float("-inf"))
    return logits.softmax(-1)[:, :, 0].mean(1)
